"""The router between real sockets: what a client sends and gets is what the engine gets and sends."""

import asyncio

import aiohttp
import pytest

from tests.support.fake_engine import Exchange, FakeEngine, answers, chunk, response_head, silent, streams
from tests.support.router_cluster import DEPLOYMENT, MODEL, NAMESPACE, cluster, endpoint_record
from tests.support.waiting import eventually

OK = b'{"id": "chatcmpl-1", "model":"chat",  "choices": []}'
EVENTS = [
    b'data: {"id":"1","choices":[{"delta":{"content":""}}]}\n\n',
    ': keep-alive\n\ndata: {"choices":[{"delta":{"content":"h\u00e9llo"}}]}\n\n'.encode(),
    b'data: {"choices":[]}\n\ndata: [DO',
    b"NE]\n\n",
]


async def test_body_and_answer_pass_byte_for_byte() -> None:
    body = (
        b'{ "messages":[{"role":"user","content":"\\u0041 \xc3\xa9"}] ,"model" : "chat", '
        b'"seed": 1.50 ,"n":12345678901234567890123}'
    )
    async with FakeEngine(answers(200, OK)) as engine, cluster(urls=[engine.url]) as it:
        async with it.client.post(
            f"{it.url}/v1/chat/completions?trace=1", data=body, headers={**it.headers, "x-custom": "kept"}
        ) as response:
            assert response.status == 200
            assert await response.read() == OK
            assert response.headers["content-type"] == "application/json"
            assert response.headers["x-millrace-endpoint"] == "chat-0"
            assert "fake" not in response.headers.get("server", "")
            assert response.headers["x-request-id"] == engine.requests[0].headers["x-request-id"]
        seen = engine.requests[0]
        assert seen.body == body
        assert seen.path == "/v1/chat/completions?trace=1"
        assert seen.headers["x-custom"] == "kept"
        assert "authorization" not in seen.headers
        assert seen.headers["traceparent"].startswith("00-")
        assert it.router.director.loads.total == 0


async def test_request_id_and_trace_context_pass_through() -> None:
    parent = "00-" + "a" * 32 + "-" + "b" * 16 + "-01"
    given = {"x-request-id": "mine-1", "traceparent": parent, "tracestate": "vendor=1"}
    async with FakeEngine(answers(200, OK)) as engine, cluster(urls=[engine.url]) as it:
        async with it.chat(headers=given) as response:
            assert response.headers["x-request-id"] == "mine-1"
        assert {name: engine.requests[0].headers[name] for name in given} == given


async def test_stream_is_byte_exact_and_not_held_back() -> None:
    gate = asyncio.Event()
    async with FakeEngine(streams(EVENTS, gate=gate)) as engine, cluster(urls=[engine.url]) as it:
        async with it.chat(stream=True) as response:
            assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
            # The engine waits for the gate: the first event must arrive without the second.
            async with asyncio.timeout(5):
                first = await response.content.readany()
            assert first == EVENTS[0]
            assert it.router.director.loads.in_flight("chat-0") == 1
            gate.set()
            assert first + await response.content.read() == b"".join(EVENTS)
        await eventually(lambda: it.router.director.loads.total == 0)
        assert await it.metric("millrace_router_inflight_requests") == 1  # the scrape itself


@pytest.mark.parametrize("model", [DEPLOYMENT, MODEL])
async def test_model_is_renamed_only_where_the_engine_knows_it_by_another_name(model: str) -> None:
    body = b'{"n": 1.0, "model": "%s" , "x": {"model": "inner"}}' % model.encode()
    async with FakeEngine(answers(200, OK)) as engine, cluster() as it:
        await it.publish(endpoint_record("chat-0", engine.url, served_model_name="served"))
        async with it.client.post(f"{it.url}/v1/completions", data=body, headers=it.headers) as response:
            assert response.status == 200
        assert engine.requests[0].body == b'{"n": 1.0, "model": "served" , "x": {"model": "inner"}}'


@pytest.mark.parametrize("status", [400, 404, 422, 429, 500])
async def test_engine_errors_pass_through_once(status: int) -> None:
    body = b'{"error":{"message":"no","type":"BadRequestError","param":null,"code":%d}}' % status
    async with (
        FakeEngine(answers(status, body)) as one,
        FakeEngine(answers(status, body)) as two,
        cluster(urls=[one.url, two.url]) as it,
    ):
        async with it.chat() as response:
            assert (response.status, await response.read()) == (status, body)
            assert response.headers["x-millrace-reason"] == (
                "engine_client_error" if status < 500 else "engine_error"
            )
        assert len(one.requests) + len(two.requests) == 1
        assert not any(it.router.director.health.is_ejected(each) for each in it.router.source.view.endpoints)
        owner = "client" if status < 500 else "engine"
        assert await it.metric(f'millrace_router_upstream_errors_total{{owner="{owner}"}}') == 1


@pytest.mark.parametrize("stream", [True, False])
async def test_client_that_leaves_frees_its_engine(stream: bool) -> None:
    behaviour = streams([EVENTS[0], EVENTS[1]], gate=asyncio.Event()) if stream else silent
    async with FakeEngine(behaviour) as engine, cluster(urls=[engine.url]) as it:
        request = asyncio.ensure_future(_read_all(it.chat(stream=stream)))
        await eventually(lambda: engine.active == 1)
        request.cancel()
        await asyncio.gather(request, return_exceptions=True)
        await eventually(lambda: engine.aborted == 1 and engine.active == 0, timeout_seconds=1)
        await eventually(lambda: it.router.director.loads.total == 0)
        assert not it.router.director.health.is_ejected(it.router.source.view.endpoints[0])
        reason = 'millrace_router_requests_total{reason="client_disconnected"'
        assert await it.metric(reason) == 1


async def test_slow_client_holds_the_engine_back() -> None:
    piece = b"data: " + b"x" * 65_530 + b"\n\n"
    count = 800
    sent = 0

    async def flood(exchange: Exchange) -> None:
        nonlocal sent
        await exchange.send(
            response_head(200, {"content-type": "text/event-stream", "transfer-encoding": "chunked"})
        )
        for _ in range(count):
            await exchange.send(chunk(piece))
            sent += 1
        await exchange.send(b"0\r\n\r\n")

    async with (
        FakeEngine(flood) as engine,
        cluster(urls=[engine.url]) as it,
        it.chat(stream=True) as response,
    ):
        await response.content.readany()
        still = -1
        while still != sent:
            still = sent
            await asyncio.sleep(0.15)
        # 50 MB are on offer; what has left the engine is in bounded buffers.
        assert sent < count / 2
        total = 0
        while data := await response.content.readany():
            total += len(data)
        assert sent == count
        assert total > len(piece) * (count - 2)


async def test_view_serves_while_the_store_is_away() -> None:
    async with FakeEngine(answers(200, OK)) as engine, cluster(urls=[engine.url]) as it:
        it.store.set_available(False)
        async with it.chat() as response:
            assert response.status == 200
        async with it.client.get(f"{it.url}/health") as response:
            health = await response.json()
            assert response.status == 200
        assert health["view_synced"] is True
        assert health["endpoints"] == 1
        before = it.router.source.age_seconds()
        await eventually(lambda: it.router.source.age_seconds() > before)
        assert await it.metric("millrace_router_view_age_seconds") > 0


async def test_operator_sees_what_the_next_pick_sees() -> None:
    async with FakeEngine(answers(200, OK)) as engine, cluster(urls=[engine.url]) as it:
        await it.sample("chat-0", running=3)
        await eventually(lambda: it.router.source.samples.fresh("chat-0", "run-1") is not None)
        async with it.client.get(f"{it.url}/debug/endpoints", headers=it.headers) as response:
            assert response.status == 401
        bearer = {"Authorization": "Bearer admin-token"}
        async with it.client.get(f"{it.url}/debug/endpoints", headers=bearer) as response:
            (entry,) = (await response.json())["endpoints"]
        assert entry["replica"] == "chat-0"
        assert entry["namespace"] == NAMESPACE
        assert 0 <= entry["sample_age_seconds"] < 5


async def _read_all(request: "aiohttp.client._RequestContextManager") -> bytes:
    async with request as response:
        return await response.read()
