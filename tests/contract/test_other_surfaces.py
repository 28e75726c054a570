"""Responses, messages, rankings, forms: official clients and plain HTTP before simulators."""

import json
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import openai
import pytest
from millrace.core.v1 import types_pb2

from router.metering.usage import TokenCounts
from tests.support.fake_engine import FakeEngine, answers, breaks_after, streams
from tests.support.router_cluster import DEPLOYMENT, Cluster, cluster, endpoint_record
from tests.support.simulators import simulator
from tests.support.waiting import eventually

pytestmark = pytest.mark.integration


@pytest.fixture
async def it() -> AsyncIterator[Cluster]:
    async with (
        simulator("--enable-prompt-tokens-details") as one,
        simulator("--enable-prompt-tokens-details") as two,
        cluster(urls=[one.url, two.url], engine=types_pb2.ENGINE_SIMULATOR) as made,
    ):
        yield made


async def post(it: Cluster, path: str, document: Any) -> Any:
    async with it.client.post(it.url + path, json=document, headers=it.headers) as response:
        assert response.status == 200, await response.text()
        return await response.json()


async def test_responses_through_the_openai_client(it: Cluster) -> None:
    async with openai.AsyncOpenAI(api_key=it.api_key, base_url=f"{it.url}/v1", max_retries=0) as client:
        first = await client.responses.create(model=DEPLOYMENT, input="one two three", max_output_tokens=3)
        assert first.output_text == "one two three"
        assert first.usage is not None
        assert it.usages[-1].counts == TokenCounts(first.usage.input_tokens, 3, 0, exact=True)
        # Two engines take turns, and only the one that made it knows it.
        for _ in range(4):
            assert (await client.responses.retrieve(first.id)).output_text == "one two three"
            second = await client.responses.create(
                model=DEPLOYMENT, input="four", previous_response_id=first.id, max_output_tokens=1
            )
            assert second.output_text == "four"
        with pytest.raises(openai.BadRequestError, match="Cannot cancel"):
            await client.responses.cancel(first.id)
        for wrong in ("resp_0123456789abcdef", "resp_" + "0" * 32):
            with pytest.raises(openai.NotFoundError) as missing:
                await client.responses.retrieve(wrong)
            assert missing.value.code == "response_not_found"
        stream = await client.responses.create(
            model=DEPLOYMENT, input="one two three", max_output_tokens=3, stream=True
        )
        kinds = [event.type async for event in stream]
        assert kinds[0] == "response.created"
        assert kinds[-1] == "response.completed"
        assert it.usages[-1].counts.completion == 3
        assert it.usages[-1].counts.exact


async def test_messages_in_anthropics_shape(it: Cluster) -> None:
    body = {
        "model": DEPLOYMENT,
        "max_tokens": 3,
        "system": "brief",
        "messages": [{"role": "user", "content": [{"type": "text", "text": "one two three"}]}],
    }
    headers = {"x-api-key": it.api_key, "anthropic-version": "2023-06-01"}
    async with it.client.post(f"{it.url}/v1/messages", json=body, headers=headers) as response:
        message = await response.json()
    assert message["content"] == [{"type": "text", "text": "one two three"}]
    assert message["stop_reason"] == "max_tokens"
    prompt_tokens = it.usages[-1].counts.prompt
    assert it.usages[-1].counts == TokenCounts(prompt_tokens, 3, 0, exact=True)
    async with it.client.post(
        f"{it.url}/v1/messages", json={**body, "stream": True}, headers=headers
    ) as response:
        text = await response.text()
    assert text.startswith("event: message_start\n")
    assert '"type":"message_stop"' in text
    assert "[DONE]" not in text
    assert it.usages[-1].counts.prompt == prompt_tokens
    assert it.usages[-1].counts.completion == 3
    assert await post(it, "/v1/messages/count_tokens", body) == {"input_tokens": prompt_tokens}
    assert len(it.usages) == 2


@pytest.mark.parametrize(
    ("body", "headers", "status", "kind"),
    [
        ({"model": "no", "messages": []}, {}, 404, "not_found_error"),
        ({"messages": []}, {}, 400, "invalid_request_error"),
        ({"model": DEPLOYMENT, "messages": []}, {"x-api-key": "sk-wrong"}, 401, "authentication_error"),
        ({"model": DEPLOYMENT, "messages": [], "stream": 7}, {}, 400, "invalid_request_error"),
        # What the engine's own validation refuses comes in OpenAI's shape and is translated.
        ({"model": DEPLOYMENT, "max_tokens": -1, "messages": [{"role": "user", "content": "x"}]}, {}, 400,
         "invalid_request_error"),
    ],
)  # fmt: skip
async def test_errors_of_messages_have_anthropics_shape(
    it: Cluster, body: Any, headers: dict[str, str], status: int, kind: str
) -> None:
    shown = headers or {"x-api-key": it.api_key}
    async with it.client.post(f"{it.url}/v1/messages", json=body, headers=shown) as response:
        document = await response.json()
        assert response.status == status, document
        assert response.headers["x-millrace-reason"]
    assert document["type"] == "error"
    assert document["error"]["type"] == kind
    assert document["error"]["message"]
    assert document["request_id"] == response.headers["x-request-id"]


async def test_an_engine_that_is_busy_says_so_in_anthropics_shape() -> None:
    busy = b'{"error":{"message":"queue full","type":"Service Unavailable","param":null,"code":503}}'
    async with FakeEngine(answers(503, busy)) as engine, cluster(urls=[engine.url]) as it:
        body = {"model": DEPLOYMENT, "messages": []}
        async with it.client.post(f"{it.url}/v1/messages", json=body, headers=it.headers) as response:
            assert response.status == 503
            assert (await response.json())["error"] == {"type": "overloaded_error", "message": "queue full"}
        assert engine.requests[0].headers["accept-encoding"] == "identity"


@pytest.mark.parametrize(
    ("route", "expected"),
    [
        ("/v1/messages", b'event: error\ndata: {"type":"error","error":{"type":"api_error"'),
        ("/v1/responses", b'event: error\ndata: {"type":"error","code":"upstream_error"'),
        ("/v1/chat/completions", b'data: {"error":'),
    ],
)
async def test_a_stream_that_breaks_says_so_in_its_own_shape(route: str, expected: bytes) -> None:
    first = b'event: ping\ndata: {"type":"ping"}\n\n'
    async with FakeEngine(breaks_after(first)) as engine, cluster(urls=[engine.url]) as it:
        document = {"model": DEPLOYMENT, "stream": True, "messages": [], "input": "x"}
        async with it.client.post(it.url + route, json=document, headers=it.headers) as response:
            body = await response.read()
        assert body.startswith(first + expected)
        assert body.endswith(b"[DONE]\n\n") is (route == "/v1/chat/completions")


async def test_rankings_scores_and_tokens(it: Cluster) -> None:
    documents = ["bread and butter", "a mill by the race"]
    for route in ("/rerank", "/v1/rerank", "/v2/rerank"):
        ranked = await post(
            it, route, {"model": DEPLOYMENT, "query": "the mill race", "documents": documents}
        )
        assert [each["index"] for each in ranked["results"]] == [1, 0]
        assert it.usages[-1].counts == TokenCounts(ranked["usage"]["prompt_tokens"], 0, None, exact=True)
    for route in ("/score", "/v1/score"):
        scored = await post(it, route, {"model": DEPLOYMENT, "text_1": "the mill", "text_2": documents})
        assert scored["data"][1]["score"] > scored["data"][0]["score"]
        assert it.usages[-1].counts.prompt == scored["usage"]["prompt_tokens"]
    count = len(it.usages)
    tokens = await post(it, "/tokenize", {"model": DEPLOYMENT, "prompt": "the mill race"})
    text = await post(it, "/detokenize", {"model": DEPLOYMENT, "tokens": tokens["tokens"]})
    assert text == {"prompt": "the mill race"}
    # Nothing is generated, nothing is metered.
    assert len(it.usages) == count


AUDIO = bytes(range(256)) * 400


def form(*fields: tuple[str, Any]) -> aiohttp.FormData:
    made = aiohttp.FormData()
    for name, value in fields:
        if isinstance(value, bytes):
            made.add_field(name, value, filename="speech.wav", content_type="audio/wav")
        else:
            made.add_field(name, value)
    return made


@pytest.mark.parametrize("first", ["file", "model"])
@pytest.mark.parametrize("served", [DEPLOYMENT, "org/whisper"])
async def test_forms_pass_with_their_files_untouched(first: str, served: str) -> None:
    usage = {"type": "tokens", "input_tokens": 14, "output_tokens": 5, "total_tokens": 19}
    behaviour = answers(200, json.dumps({"text": "hello", "usage": usage}).encode())
    fields = [("file", AUDIO), ("model", DEPLOYMENT), ("language", "en")]
    fields.sort(key=lambda field: field[0] != first)
    async with FakeEngine(behaviour) as engine, cluster() as it:
        await it.publish(endpoint_record("chat-0", engine.url, served_model_name=served))
        async with it.client.post(
            f"{it.url}/v1/audio/transcriptions", data=form(*fields), headers=it.headers
        ) as response:
            assert (await response.json())["text"] == "hello"
        (seen,) = engine.requests
        assert seen.headers["content-type"].startswith("multipart/form-data; boundary=")
        assert AUDIO in seen.body
        assert f'name="model"\r\n\r\n{served}\r\n'.encode() in seen.body
        assert len(seen.body) == int(seen.headers["content-length"])
        assert it.usages[-1].counts == TokenCounts(14, 5, None, exact=True)


@pytest.mark.parametrize(
    ("content_type", "body", "reason"),
    [
        ("multipart/form-data", b"x", "body_malformed"),
        ("multipart/form-data; boundary=b", b"--b\r\nno end", "body_malformed"),
        ("multipart/form-data; boundary=b", b"--b--\r\n", "model_missing"),
        ("multipart/form-data; boundary=b", b"", "model_missing"),
        ("multipart/form-data; boundary=b",
         b'--b\r\nContent-Disposition: form-data; name="model"\r\n\r\n\xff\r\n--b--', "body_malformed"),
        ("multipart/form-data; boundary=b",
         b'--b\r\nContent-Disposition: form-data; name="model"\r\n\r\n' + b"m" * 5000 + b"\r\n--b--",
         "model_missing"),
        ("application/json", b"--b", "body_malformed"),
    ],
)  # fmt: skip
async def test_wrong_forms_are_refused(content_type: str, body: bytes, reason: str) -> None:
    async with cluster() as it:
        headers = {**it.headers, "Content-Type": content_type}
        async with it.client.post(f"{it.url}/v1/audio/translations", data=body, headers=headers) as response:
            assert (response.status, response.headers["x-millrace-reason"]) == (400, reason)


async def test_binary_answers_and_images_pass_through() -> None:
    async with FakeEngine(answers(200, AUDIO, "audio/mpeg")) as engine, cluster(urls=[engine.url]) as it:
        for route in ("/v1/audio/speech", "/v1/images/generations"):
            async with it.client.post(
                it.url + route, json={"model": DEPLOYMENT, "input": "hi"}, headers=it.headers
            ) as response:
                assert response.headers["content-type"] == "audio/mpeg"
                assert await response.read() == AUDIO
        assert it.usages[-1].counts == TokenCounts()


async def test_what_is_not_served_is_answered_with_what_is(it: Cluster) -> None:
    async with it.client.post(f"{it.url}/v1/fine_tuning/jobs", json={}, headers=it.headers) as response:
        assert response.status == 404
        message = (await response.json())["error"]["message"]
    for route in ("POST /v1/responses", "GET /v1/responses/{response_id}", "POST /v1/audio/speech", "/score"):
        assert route in message


async def test_a_response_whose_engine_has_gone_is_not_found() -> None:
    document = json.dumps({"id": "resp_1", "usage": None}).encode()
    async with FakeEngine(answers(200, document)) as engine, cluster(urls=[engine.url]) as it:
        await post(it, "/v1/responses", {"model": DEPLOYMENT, "input": "x"})
        response_id = engine.requests[0].json["request_id"]
        url = f"{it.url}/v1/responses/{response_id}"
        async with it.client.get(url + "?stream=true&starting_after=3", headers=it.headers) as response:
            assert response.status == 200
        assert engine.requests[1].method == "GET"
        assert engine.requests[1].path == f"/v1/responses/{response_id}?stream=true&starting_after=3"
        stranger = await it.make_key("team-b")
        await eventually(lambda: len(it.router.source.view.api_keys) == 2)
        async with it.client.get(url, headers={"Authorization": f"Bearer {stranger}"}) as response:
            assert response.status == 404
        await it.withdraw("chat-0")
        await eventually(lambda: not it.router.source.view.endpoints)
        async with it.client.get(url, headers=it.headers) as response:
            assert (response.status, response.headers["x-millrace-reason"]) == (404, "response_not_found")


async def test_streams_of_named_events_pass_as_they_come() -> None:
    pieces = [b"event: a\nda", b'ta: {"type":"a"}\n\n', b": c\n\n"]
    async with (
        FakeEngine(streams(pieces)) as engine,
        cluster(urls=[engine.url]) as it,
        it.client.post(
            f"{it.url}/v1/responses",
            json={"model": DEPLOYMENT, "input": "x", "stream": True},
            headers=it.headers,
        ) as response,
    ):
        assert await response.read() == b"".join(pieces)
