"""Engines that fail, before and after the first byte."""

import asyncio
import socket
import time

import pytest

from router.view.view import EndpointState
from tests.support.fake_engine import (
    Behaviour,
    FakeEngine,
    answers,
    breaks_after,
    hangs_up,
    resets,
    silent,
    streams,
)
from tests.support.router_cluster import cluster, endpoint_record
from tests.support.waiting import eventually

OK = b'{"choices": []}'
EVENT = b'data: {"choices":[]}\n\n'
DEAD = (
    b'{"error":{"message":"EngineCore encountered an issue. See stack trace.",'
    b'"type":"InternalServerError","param":null,"code":500}}'
)
DRAINING = b'{"error":{"message":"cannot schedule new futures after shutdown","code":500}}'
OVERLOADED = b'{"error":{"message":"queue full","type":"Service Unavailable","param":null,"code":503}}'


def closed_port() -> str:
    """A port of this machine that nothing listens on; bound, so that nobody takes it meanwhile."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(
    "behaviour",
    [
        pytest.param(resets, id="reset"),
        pytest.param(hangs_up, id="hang-up"),
        pytest.param(answers(503, OVERLOADED), id="503"),
        pytest.param(answers(502, b"bad gateway", "text/plain"), id="502"),
        pytest.param(answers(500, DEAD), id="dead"),
        pytest.param(answers(500, DRAINING), id="draining"),
        pytest.param(streams([b"data: " + DEAD + b"\n\n", b"data: [DONE]\n\n"]), id="dead-in-stream"),
    ],
)
async def test_fails_over_before_the_first_byte(behaviour: Behaviour, stream: bool) -> None:
    good = streams([EVENT, b"data: [DONE]\n\n"]) if stream else answers(200, OK)
    async with (
        FakeEngine(behaviour) as bad,
        FakeEngine(good) as other,
        cluster(urls=[bad.url, other.url]) as it,
    ):
        async with it.chat(stream=stream) as response:
            assert response.status == 200
            assert response.headers["x-millrace-endpoint"] == "chat-1"
            assert await response.read() == (EVENT + b"data: [DONE]\n\n" if stream else OK)
        assert len(bad.requests) == 1
        assert it.router.director.loads.total == 0
        # The failed one is left alone now.
        for _ in range(3):
            async with it.chat(stream=stream) as response:
                assert response.headers["x-millrace-endpoint"] == "chat-1"
        assert len(bad.requests) == 1


async def test_fails_over_when_nothing_listens() -> None:
    async with FakeEngine(answers(200, OK)) as good, cluster(urls=[closed_port(), good.url]) as it:
        async with it.chat() as response:
            assert response.status == 200
        assert await it.metric('millrace_router_retries_total{cause="connect_refused"}') == 1
        assert await it.metric('millrace_router_upstream_errors_total{owner="transport"}') == 1


async def test_stale_connection_is_not_the_engines_fault() -> None:
    """An engine that closes its idle connections in the very moment of the next request."""
    async with FakeEngine(answers(200, OK)) as engine, cluster(urls=[engine.url]) as it:
        async with it.chat() as response:
            await response.read()
        served = engine.behaviour
        engine.behaviour = _hangs_up_once(engine, served)
        async with it.chat() as response:
            assert response.status == 200
        assert not it.router.director.health.is_ejected(it.router.source.view.endpoints[0])
        assert await it.metric('millrace_router_retries_total{cause="stale_connection"}') == 1


def _hangs_up_once(engine: FakeEngine, then: Behaviour) -> Behaviour:
    async def behave(exchange: object) -> None:
        engine.behaviour = then
        await hangs_up(exchange)  # type: ignore[arg-type]  # an Exchange, as every behaviour gets

    return behave


async def test_no_retry_after_the_first_byte_of_a_stream() -> None:
    async with (
        FakeEngine(breaks_after(EVENT + b'data: {"cho')) as bad,
        FakeEngine(answers(200, OK)) as other,
        cluster(urls=[bad.url, other.url]) as it,
    ):
        async with it.chat(stream=True) as response:
            assert response.status == 200
            body = await response.read()
        events = [line for line in body.split(b"\n\n") if line]
        assert events[0] + b"\n\n" == EVENT
        assert b'"code":"upstream_error"' in events[2]
        assert events[-1] == b"data: [DONE]"
        assert other.requests == []
        assert it.router.director.health.is_ejected(it.router.source.view.endpoints[0])
        assert await it.metric('millrace_router_requests_total{reason="upstream_broken"') == 1
        assert it.router.director.loads.total == 0


async def test_a_broken_whole_answer_closes_the_connection() -> None:
    async with (
        FakeEngine(breaks_after(b'{"choices"', content_length=1000)) as bad,
        FakeEngine(answers(200, OK)) as other,
        cluster(urls=[bad.url, other.url]) as it,
    ):
        reader, writer = await asyncio.open_connection(*it.url.removeprefix("http://").split(":"))
        body = b'{"model":"chat"}'
        writer.write(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n"
            b"Authorization: Bearer %s\r\nContent-Length: %d\r\n\r\n%s"
            % (it.api_key.encode(), len(body), body)
        )
        received = b""
        try:
            async with asyncio.timeout(5):
                received = await reader.read(-1)
        except ConnectionResetError:
            pass
        writer.close()
        assert not received.endswith(b"}")
        assert other.requests == []


async def test_first_byte_timeout_is_a_504_and_frees_the_engine() -> None:
    async with (
        FakeEngine(silent) as one,
        FakeEngine(silent) as two,
        cluster(
            urls=[one.url, two.url], first_byte_timeout_seconds=0.1, whole_answer_timeout_seconds=0.1
        ) as it,
    ):
        for stream in (True, False):
            async with it.chat(stream=stream) as response:
                error = (await response.json())["error"]
                assert (response.status, error["code"]) == (504, "upstream_timeout")
                assert response.headers["x-millrace-reason"] == "first_byte_timeout"
        await eventually(lambda: one.aborted + two.aborted == 2)
        assert it.router.director.loads.total == 0


async def test_idle_timeout_ends_the_stream_with_an_error() -> None:
    async with (
        FakeEngine(streams([EVENT, EVENT], gate=asyncio.Event())) as engine,
        cluster(urls=[engine.url], idle_timeout_seconds=0.1) as it,
    ):
        async with it.chat(stream=True) as response:
            body = await response.read()
        assert body.startswith(EVENT)
        assert b"stopped sending" in body
        assert body.endswith(b"data: [DONE]\n\n")
        await eventually(lambda: engine.aborted == 1)


async def test_connect_timeout_is_retried_then_a_504() -> None:
    # A listener whose queue is full drops further connections: they time out.
    with socket.socket() as full:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        address = full.getsockname()
        fillers = [socket.socket() for _ in range(4)]
        for filler in fillers:
            filler.setblocking(False)
            filler.connect_ex(address)
        try:
            url = f"http://127.0.0.1:{address[1]}"
            async with cluster(urls=[url], connect_timeout_seconds=0.1) as it:
                async with it.chat() as response:
                    assert response.status == 504
                    assert response.headers["x-millrace-reason"] == "connect_timeout"
                async with FakeEngine(answers(200, OK)) as good:
                    await it.publish(endpoint_record("chat-1", good.url))
                    async with it.chat() as response:
                        assert response.status == 200
        finally:
            for filler in fillers:
                filler.close()


async def test_a_replacement_that_appears_in_time_is_used() -> None:
    async with (
        FakeEngine(resets) as bad,
        FakeEngine(answers(200, OK)) as fresh,
        cluster(urls=[bad.url]) as it,
    ):
        request = asyncio.ensure_future(_status(it.chat()))
        await eventually(lambda: len(bad.requests) == 1)
        assert not request.done()
        await it.publish(endpoint_record("chat-9", fresh.url))
        assert await request == (200, "chat-9")


async def test_without_a_replacement_it_is_a_503_in_bounded_time() -> None:
    async with FakeEngine(resets) as bad, cluster(urls=[bad.url]) as it:
        started = time.monotonic()
        async with it.chat() as response:
            error = (await response.json())["error"]
            assert (response.status, error["code"]) == (503, "no_endpoint_available")
            assert response.headers["x-millrace-reason"] == "all_endpoints_failed"
            assert response.headers["retry-after"] == "1"
        assert 0.9 < time.monotonic() - started < 3


async def test_an_engines_own_refusal_is_passed_on_when_all_refuse() -> None:
    async with (
        FakeEngine(answers(503, OVERLOADED)) as one,
        cluster(urls=[one.url]) as it,
        it.chat() as response,
    ):
        assert (response.status, await response.read()) == (503, OVERLOADED)
        assert response.headers["retry-after"] == "1"


async def test_attempts_are_bounded() -> None:
    async with FakeEngine(resets) as bad, cluster() as it:
        await it.publish(*(endpoint_record(f"chat-{n}", bad.url) for n in range(6)))
        async with it.chat() as response:
            assert response.status == 503
        assert len(bad.requests) == 3


async def test_retries_have_a_budget() -> None:
    async with (
        FakeEngine(resets) as bad,
        FakeEngine(answers(200, OK)) as good,
        cluster(urls=[bad.url, good.url]) as it,
    ):
        while it.router.director.budget.take():
            pass
        async with it.chat() as response:
            assert response.status == 503
            assert response.headers["x-millrace-reason"] == "retry_budget_exhausted"
        assert good.requests == []


async def test_unhealthy_serves_when_nothing_else_is_left_and_draining_never() -> None:
    async with FakeEngine(answers(200, OK)) as engine, cluster() as it:
        await it.publish(endpoint_record("chat-0", engine.url, state=EndpointState.DRAINING))
        async with it.chat() as response:
            assert response.status == 503
            assert "1 draining" in (await response.json())["error"]["message"]
        await it.publish(endpoint_record("chat-1", engine.url, state=EndpointState.UNHEALTHY))
        async with it.chat() as response:
            assert response.headers["x-millrace-endpoint"] == "chat-1"
        await it.publish(endpoint_record("chat-2", engine.url))
        for _ in range(3):
            async with it.chat() as response:
                assert response.headers["x-millrace-endpoint"] == "chat-2"


async def test_killed_engine_under_load_fails_no_request_that_it_was_not_answering() -> None:
    async with (
        FakeEngine(answers(200, OK)) as doomed,
        FakeEngine(answers(200, OK)) as other,
        cluster(strategy="least-pending", urls=[doomed.url, other.url]) as it,
    ):
        statuses: list[int] = []

        async def client() -> None:
            for _ in range(40):
                async with it.chat() as response:
                    statuses.append(response.status)

        async with asyncio.TaskGroup() as group:
            for _ in range(8):
                group.create_task(client())
            await eventually(lambda: len(statuses) > 100, interval_seconds=0.001)
            await doomed.die()
        assert statuses == [200] * 320
        assert it.router.director.loads.total == 0


async def _status(request: object) -> tuple[int, str]:
    async with request as response:  # type: ignore[attr-defined]  # aiohttp's request context
        return response.status, response.headers.get("x-millrace-endpoint", "")
