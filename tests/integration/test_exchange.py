"""Requests without a task, on connections that are kept: whatever goes wrong, all is given back once."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import pytest

from router import attempts
from router.metering.usage import UsageOutcome
from router.upstream.forward import STALE_SECONDS
from tests.support.fake_engine import (
    Behaviour,
    Exchange,
    FakeEngine,
    answers,
    breaks_after,
    hangs_up,
    resets,
    response_head,
    silent,
    streams,
)
from tests.support.router_cluster import DEPLOYMENT, NAMESPACE, Cluster, cluster
from tests.support.waiting import eventually

OK = b'{"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 2}}'
EVENT = b'data: {"choices":[{"index":0,"delta":{"content":"x"},"finish_reason":null}]}\n\n'


@asynccontextmanager
async def _warm(*behaviours: Behaviour, **options: Any) -> AsyncIterator[tuple[Cluster, list[FakeEngine]]]:
    """Engines to each of which a connection is kept, and which behave as they are told from then on."""
    engines = [FakeEngine(answers(200, OK)) for _ in behaviours]
    for each in engines:
        await each.__aenter__()
    try:
        async with cluster(urls=[each.url for each in engines], **options) as it:
            for _ in engines:
                async with it.chat() as response:
                    assert await response.read() == OK
            for engine, behaviour in zip(engines, behaviours, strict=True):
                assert engine.connections == 1
                engine.behaviour = behaviour
            it.usages.clear()
            yield it, engines
            await eventually(lambda: it.router.serving.in_flight == 0)
            director = it.router.director
            assert director.loads.total == 0
            lane = director.candidates.gate.lane(NAMESPACE, DEPLOYMENT)
            assert (lane.in_flight, lane.ended_total) == (0, lane.requests_total + _retried(it))
            assert all(len(each.ledger) == 0 for each in director.candidates.selectors)
            # Nothing is held back: whoever comes next is served.
            async with aiohttp.ClientSession() as another:
                it.client, used = another, it.client
                async with it.chat() as response:
                    assert response.status == 200
                it.client = used
    finally:
        for each in engines:
            await each.die()


def _retried(it: Cluster) -> int:
    """Attempts beyond the first of each request."""
    return sum(max(0, each.record.attempts - 1) for each in _decisions(it))


def _decisions(it: Cluster) -> list[Any]:
    return [each for each in it.router.director.candidates.decisions._ring if each is not None]


async def _late_reset(exchange: Exchange) -> None:
    await asyncio.sleep(STALE_SECONDS + 0.1)
    exchange.abort()


@pytest.mark.parametrize(
    "behaviour",
    [
        pytest.param(answers(503, b'{"error": "busy"}'), id="503"),
        pytest.param(answers(500, b'{"error": "EngineDeadError"}'), id="dead"),
        pytest.param(resets, id="reset"),
        pytest.param(hangs_up, id="hang-up"),
        pytest.param(_late_reset, id="late-reset"),
    ],
)
async def test_an_engine_that_does_not_serve_is_passed_over(behaviour: Behaviour) -> None:
    async with _warm(behaviour, answers(200, OK)) as (it, (bad, good)):
        async with it.chat() as response:
            assert (response.status, await response.read()) == (200, OK)
            assert response.headers["x-millrace-endpoint"] == "chat-1"
        assert len(bad.requests) in (2, 3)
        assert len(good.requests) == 2
        assert [each.outcome for each in it.usages] == [UsageOutcome.COMPLETE]
        assert not it.router.director.health.clean


async def test_a_stale_connection_costs_the_engine_nothing() -> None:
    async def first_hangs_up(exchange: Exchange) -> None:
        if len(engine.requests) == 2:
            exchange.hang_up()
        else:
            await answers(200, OK)(exchange)

    async with _warm(silent) as (it, (engine,)):
        engine.behaviour = first_hangs_up
        async with it.chat() as response:
            assert (response.status, await response.read()) == (200, OK)
        assert engine.connections == 2
        assert await it.metric('millrace_router_retries_total{cause="stale_connection"}') == 1
        assert it.router.director.health.clean
        assert [each.record.attempts for each in _decisions(it)] == [1, 1]


async def test_no_first_byte_in_time_is_a_504() -> None:
    async with _warm(silent, whole_answer_timeout_seconds=0.2) as (it, (engine,)):
        async with it.chat() as response:
            assert response.status == 504
        await eventually(lambda: engine.aborted == 1)
        engine.behaviour = answers(200, OK)


async def test_a_stream_that_breaks_ends_as_an_error() -> None:
    async with _warm(breaks_after(EVENT)) as (it, (engine,)):
        async with it.chat(stream=True) as response:
            assert response.status == 200
            text = await response.read()
        assert text.startswith(EVENT)
        assert b'data: {"error"' in text
        assert text.endswith(b"data: [DONE]\n\n")
        assert [each.outcome for each in it.usages] == [UsageOutcome.FAILED]
        assert not it.router.director.health.clean
        engine.behaviour = answers(200, OK)


async def test_an_answer_that_breaks_does_not_look_complete() -> None:
    async with _warm(breaks_after(b'{"choi', content_length=1000)) as (it, (engine,)):
        with pytest.raises(Exception, match="payload"):
            async with it.chat() as response:
                await response.read()
        assert [each.outcome for each in it.usages] == [UsageOutcome.FAILED]
        engine.behaviour = answers(200, OK)


@pytest.mark.parametrize("streaming", [False, True])
async def test_a_client_that_leaves_frees_its_engine(streaming: bool) -> None:
    async with _warm(streams([EVENT, EVENT], gate=asyncio.Event()) if streaming else silent) as (
        it,
        (engine,),
    ):
        task = asyncio.create_task(_read_events(it, 1 if streaming else 0), name="leaving-client")
        await eventually(lambda: len(engine.requests) == 2)
        if streaming:
            await task
        else:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        await eventually(lambda: engine.aborted == 1 and len(it.usages) == 1)
        assert [each.outcome for each in it.usages] == [UsageOutcome.CLIENT_GONE]
        assert it.router.director.health.clean
        record = max(_decisions(it), key=lambda each: float(each.record.started_seconds)).record
        assert (record.status, record.reason.value) == (499, "client_disconnected")
        engine.behaviour = answers(200, OK)


async def _read_events(it: Cluster, count: int) -> None:
    async with it.chat(stream=True) as response:
        for _ in range(count):
            await response.content.readuntil(b"\n\n")


LARGE = b'{"text": "' + b"x" * 12_000_000 + b'"}'


async def test_a_slow_client_gets_all_of_it() -> None:
    async with _warm(answers(200, LARGE)) as (it, (engine,)):
        async with it.chat() as response:
            await asyncio.sleep(0.3)
            assert not it.usages
            assert await response.read() == LARGE
        await eventually(lambda: len(it.usages) == 1)
        assert [each.outcome for each in it.usages] == [UsageOutcome.COMPLETE]
        engine.behaviour = answers(200, OK)


async def test_a_client_that_takes_nothing_is_cut_off() -> None:
    async with _warm(answers(200, LARGE), idle_timeout_seconds=0.3) as (it, (engine,)):
        async with it.chat() as response:
            await eventually(lambda: len(it.usages) == 1)
            assert response.status == 200
        assert [each.outcome for each in it.usages] == [UsageOutcome.CLIENT_GONE]
        assert it.router.director.health.clean
        engine.behaviour = answers(200, OK)


@pytest.mark.skipif(not str(attempts.__file__).endswith(".py"), reason="nothing compiled can be replaced")
@pytest.mark.parametrize(("where", "status"), [("open", 500), ("answered", 500), ("ended", None)])
async def test_an_error_of_our_own_gives_everything_back(
    where: str, status: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with _warm(answers(200, OK)) as (it, _):
        counting, failures = it.router.director.attempts, [1]
        method = getattr(type(counting), where)

        def fails_once(*arguments: Any) -> Any:
            if failures:
                failures.pop()
                raise RuntimeError("broken")
            return method(counting, *arguments)

        monkeypatch.setattr(counting, where, fails_once, raising=False)
        if status is None:
            # The answer has gone out, but the connection does not go on as if nothing had been.
            async with it.chat() as response:
                assert await response.read() == OK
        else:
            async with it.chat() as response:
                assert response.status == status
                assert response.headers["x-millrace-reason"] == "internal_error"
        if where == "open":
            # It was taken before it was counted.
            lane = it.router.director.candidates.gate.lane(NAMESPACE, DEPLOYMENT)
            lane.ended_total += 1


async def test_what_comes_in_two_packets_and_what_is_too_large_go_the_other_way() -> None:
    async with _warm(answers(200, OK), request_body_bytes_max=1024) as (it, (engine,)):
        async with it.client.post(
            f"{it.url}/v1/chat/completions", headers=it.headers, data=b" " * 2000
        ) as response:
            assert response.status == 413
        async with it.client.post(
            f"{it.url}/v1/chat/completions", headers=it.headers, json={"model": "unknown", "messages": []}
        ) as response:
            assert response.status == 404
        assert len(engine.requests) == 1


async def test_a_first_event_of_a_dead_engine_is_no_answer() -> None:
    event = b'data: {"error": {"message": "EngineCore encountered an issue"}}\n\n'
    done = EVENT + b"data: [DONE]\n\n"
    async with _warm(streams([event]), streams([done])) as (it, _), it.chat(stream=True) as response:
        assert response.headers["x-millrace-endpoint"] == "chat-1"
        assert await response.read() == done


async def test_a_head_alone_makes_no_answer() -> None:
    async def head_only(exchange: Exchange) -> None:
        await exchange.send(response_head(200, {"content-type": "text/event-stream", "content-length": "9"}))
        await asyncio.sleep(STALE_SECONDS + 0.1)
        exchange.abort()

    async with _warm(head_only, answers(200, OK)) as (it, _), it.chat() as response:
        assert response.headers["x-millrace-endpoint"] == "chat-1"
