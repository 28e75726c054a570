"""The OpenAI surface as clients see it: the official client works unchanged, every refusal has its shape."""

import asyncio
import base64
import struct
from typing import Any

import openai
import orjson
import pytest

from core.identity import generate_api_key
from core.store import Delete, keys
from tests.support.fake_engine import Exchange, FakeEngine, answers, chunk, response_head
from tests.support.router_cluster import DEPLOYMENT, MODEL, NAMESPACE, Cluster, cluster
from tests.support.waiting import eventually

CHAT = {
    "id": "chatcmpl-1",
    "object": "chat.completion",
    "created": 1,
    "model": DEPLOYMENT,
    "choices": [
        {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "Hello you"}}
    ],
    "usage": {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3},
}


async def _engine(exchange: Exchange) -> None:
    """Answers each route as vLLM does."""
    request = exchange.request
    if request.path == "/v1/embeddings":
        vector = base64.b64encode(struct.pack("<2f", 0.5, -1.0)).decode()
        entry = {"object": "embedding", "index": 0, "embedding": vector}
        document: dict[str, Any] = {"object": "list", "data": [entry], "model": DEPLOYMENT, "usage": {}}
        await answers(200, orjson.dumps(document))(exchange)
    elif request.json.get("stream"):
        await exchange.send(
            response_head(200, {"content-type": "text/event-stream", "transfer-encoding": "chunked"})
        )
        for text in ("", "Hello", " you"):
            event = {
                "id": "chatcmpl-1",
                "object": "chat.completion.chunk",
                "created": 1,
                "model": DEPLOYMENT,
                "choices": [{"index": 0, "delta": {"content": text}, "finish_reason": None}],
            }
            await exchange.send(chunk(b"data: " + orjson.dumps(event) + b"\n\n"))
        await exchange.send(chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n")
    elif request.path == "/v1/completions":
        choice = {"index": 0, "text": "Hello you", "finish_reason": "stop", "logprobs": None}
        document = {"id": "1", "object": "text_completion", "created": 1, "model": "m", "choices": [choice]}
        await answers(200, orjson.dumps(document))(exchange)
    else:
        await answers(200, orjson.dumps(CHAT))(exchange)


def _client(it: Cluster, **options: Any) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(api_key=it.api_key, base_url=f"{it.url}/v1", max_retries=0, **options)


async def test_openai_client_works_unchanged() -> None:
    async with FakeEngine(_engine) as engine, cluster(urls=[engine.url]) as it, _client(it) as client:
        messages: Any = [{"role": "user", "content": "Hi"}]
        chat = await client.chat.completions.create(model=DEPLOYMENT, messages=messages)
        assert chat.choices[0].message.content == "Hello you"
        by_declared_id = await client.chat.completions.create(model=MODEL, messages=messages)
        assert by_declared_id.choices[0].message.content == "Hello you"
        stream = await client.chat.completions.create(model=DEPLOYMENT, messages=messages, stream=True)
        assert "".join([part.choices[0].delta.content or "" async for part in stream]) == "Hello you"
        completion = await client.completions.create(model=DEPLOYMENT, prompt="Hi")
        assert completion.choices[0].text == "Hello you"
        embeddings = await client.embeddings.create(model=DEPLOYMENT, input="Hi")
        assert embeddings.data[0].embedding == [0.5, -1.0]


async def test_models_come_from_the_view_and_stay_within_the_namespace() -> None:
    async with cluster() as it, _client(it) as client:
        await it.declare("other", namespace="team-b")
        await it.declare("another")
        await eventually(lambda: len(it.router.source.view.tenants) == 2)
        await eventually(lambda: len(it.router.source.view.tenants[NAMESPACE].deployments) == 2)
        models = [model async for model in client.models.list()]
        assert [model.id for model in models] == ["another", DEPLOYMENT]
        assert {model.owned_by for model in models} == {NAMESPACE}
        assert all(model.created > 1_000_000_000 for model in models)
        assert (await client.models.retrieve(DEPLOYMENT)).id == DEPLOYMENT
        with pytest.raises(openai.NotFoundError):
            await client.models.retrieve("other")


async def test_openai_client_raises_its_own_errors() -> None:
    messages: Any = [{"role": "user", "content": "Hi"}]
    async with cluster() as it, _client(it) as client:
        with pytest.raises(openai.InternalServerError) as unavailable:
            await client.chat.completions.create(model=DEPLOYMENT, messages=messages)
        assert unavailable.value.status_code == 503
        assert unavailable.value.code == "no_endpoint_available"
        with pytest.raises(openai.NotFoundError) as missing:
            await client.chat.completions.create(model="nothing", messages=messages)
        assert missing.value.code == "model_not_found"
        stranger = client.with_options(api_key=generate_api_key())
        with pytest.raises(openai.AuthenticationError) as unknown:
            await stranger.chat.completions.create(model=DEPLOYMENT, messages=messages)
        assert unknown.value.code == "invalid_api_key"


CHAT_ROUTE = "/v1/chat/completions"


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "reason", "code", "param"),
    [
        ("POST", CHAT_ROUTE, b"{", 400, "body_malformed", "invalid_json", None),
        ("POST", CHAT_ROUTE, b"", 400, "body_malformed", "invalid_json", None),
        ("POST", CHAT_ROUTE, b"[]", 400, "body_malformed", "invalid_json", None),
        ("POST", CHAT_ROUTE, b'{"model": "\xff"}', 400, "body_malformed", "invalid_json", None),
        ("POST", CHAT_ROUTE, b"{}", 400, "model_missing", "missing_required_parameter", "model"),
        ("POST", CHAT_ROUTE, b'{"model": ""}', 400, "model_missing", "missing_required_parameter", "model"),
        ("POST", CHAT_ROUTE, b'{"model": 7}', 400, "parameter_invalid", "invalid_type", "model"),
        (
            "POST",
            CHAT_ROUTE,
            b'{"model":"chat","stream":"yes"}',
            400,
            "parameter_invalid",
            "invalid_type",
            "stream",
        ),
        ("POST", CHAT_ROUTE, b'{"model":"no"}', 404, "model_not_found", "model_not_found", "model"),
        ("POST", CHAT_ROUTE, b" " * 3000, 413, "body_too_large", "request_too_large", None),
        (
            "POST",
            CHAT_ROUTE,
            b'{"model":"chat"}',
            503,
            "no_endpoint_available",
            "no_endpoint_available",
            None,
        ),
        ("GET", CHAT_ROUTE, None, 405, "method_not_allowed", "method_not_supported", None),
        ("DELETE", "/v1/models", None, 405, "method_not_allowed", "method_not_supported", None),
        ("GET", "/v1/nothing", None, 404, "route_unknown", "unknown_url", None),
        ("POST", "/v1/realtime", b"{}", 404, "route_unknown", "unknown_url", None),
        ("GET", "/v1/models/no/such", None, 404, "model_not_found", "model_not_found", "model"),
    ],
)
async def test_refusals_have_openai_shape(
    method: str, path: str, body: bytes | None, status: int, reason: str, code: str, param: str | None
) -> None:
    async with cluster(request_body_bytes_max=2048) as it:
        async with it.client.request(method, it.url + path, data=body, headers=it.headers) as response:
            assert response.status == status
            assert response.headers["x-millrace-reason"] == reason
            assert response.headers["x-request-id"]
            document = await response.json()
        error = document["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert (error["code"], error["param"]) == (code, param)
        assert error["type"] == ("server_error" if status >= 500 else "invalid_request_error")
        if status == 503:
            assert int(response.headers["retry-after"]) >= 1
        if status == 405:
            assert response.headers["allow"]
        if reason == "route_unknown":
            assert "POST /v1/chat/completions" in error["message"]


async def test_body_without_a_length_is_bounded_too() -> None:
    async def endless() -> Any:
        for _ in range(100):
            yield b" " * 1000

    async with (
        cluster(request_body_bytes_max=2048) as it,
        it.client.post(it.url + CHAT_ROUTE, data=endless(), headers=it.headers) as response,
    ):
        assert response.status == 413


async def test_body_that_does_not_come_times_out() -> None:
    async with cluster(body_timeout_seconds=0.1) as it:
        host, port = it.url.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n"
            b"Authorization: Bearer " + it.api_key.encode() + b"\r\n\r\n{"
        )
        assert b" 408 " in await reader.readline()
        writer.close()
        await writer.wait_closed()


async def test_compressed_bodies_are_refused() -> None:
    async with cluster() as it:
        headers = {**it.headers, "Content-Encoding": "gzip"}
        async with it.client.post(it.url + CHAT_ROUTE, data=b"x", headers=headers) as response:
            assert (response.status, response.headers["x-millrace-reason"]) == (415, "body_encoded")


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        (None, "api_key_missing"),
        ("", "api_key_missing"),
        ("Bearer", "api_key_missing"),
        ("Basic c2stOg==", "api_key_missing"),
        ("Bearer " + "x" * 600, "api_key_missing"),
        ("Bearer sk-wrong", "api_key_invalid"),
    ],
)
async def test_wrong_keys(header: str | None, reason: str) -> None:
    headers = {} if header is None else {"Authorization": header}
    async with cluster() as it:
        for route in (CHAT_ROUTE, "/v1/embeddings"):
            async with it.client.post(
                it.url + route, json={"model": DEPLOYMENT}, headers=headers
            ) as response:
                assert response.status == 401
                assert (await response.json())["error"]["code"] == "invalid_api_key"
                assert response.headers["x-millrace-reason"] == reason
                assert response.headers["www-authenticate"] == "Bearer"
        async with it.client.get(f"{it.url}/v1/models", headers=headers) as response:
            assert response.status == 401


async def test_a_key_opens_its_own_namespace_only_and_closes_when_deleted() -> None:
    async with FakeEngine(_engine) as engine, cluster(urls=[engine.url]) as it:
        other = await it.make_key("team-b")
        await eventually(lambda: len(it.router.source.view.api_keys) == 2)
        async with it.chat(headers={"Authorization": f"Bearer {other}"}) as response:
            text = await response.text()
            assert (response.status, DEPLOYMENT in text) == (404, True)
            assert NAMESPACE not in text
        async with it.chat() as response:
            assert response.status == 200
        (mine,) = [each for each in it.router.source.view.api_keys.values() if each.namespace == NAMESPACE]
        await it.store.commit([Delete(keys.spec_key(mine.key_hash))])
        await eventually(lambda: len(it.router.source.view.api_keys) == 1)
        async with it.chat() as response:
            assert response.status == 401


async def test_ambiguous_declared_model_names_the_choices() -> None:
    async with FakeEngine(_engine) as engine, cluster(urls=[engine.url]) as it:
        await it.declare("second")
        await eventually(lambda: len(it.router.source.view.tenants[NAMESPACE].deployments) == 2)
        async with it.chat(model=MODEL) as response:
            assert response.status == 404
            assert response.headers["x-millrace-reason"] == "model_ambiguous"
            assert "`chat`, `second`" in (await response.json())["error"]["message"]


async def test_worker_that_is_full_says_so() -> None:
    async def held(exchange: Exchange) -> None:
        await exchange.hung_up.wait()

    async with FakeEngine(held) as engine, cluster(urls=[engine.url], requests_in_flight_max=1) as it:
        first = asyncio.ensure_future(it.chat().__aenter__())
        await eventually(lambda: engine.active == 1)
        async with it.chat() as response:
            assert (response.status, response.headers["x-millrace-reason"]) == (503, "router_overloaded")
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        await eventually(lambda: engine.active == 0)
