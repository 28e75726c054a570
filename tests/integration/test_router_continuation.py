"""Streams whose engine dies go on with another one: real simulators, killed or dying by themselves."""

import asyncio
import json
from contextlib import AsyncExitStack
from typing import Any

import aiohttp
import pytest
from millrace.core.v1 import types_pb2

from router.metering.usage import UsageOutcome
from tests.support.router_cluster import DEPLOYMENT, Cluster, cluster
from tests.support.simulators import Simulator, simulator
from tests.support.waiting import eventually

pytestmark = pytest.mark.integration

MESSAGES = [{"role": "user", "content": "Tell me about mills and races,\n\n twice  over if you can"}]
TOKENS = 40
CHAT = "/v1/chat/completions"


def request_of(route: str, **more: Any) -> dict[str, Any]:
    asked = {"messages": MESSAGES} if route == CHAT else {"prompt": "The mill and\n\n its race"}
    return {"model": DEPLOYMENT, "stream": True, "max_tokens": TOKENS, "temperature": 0, **asked, **more}


async def read(session: aiohttp.ClientSession, url: str, body: Any, headers: Any = None) -> list[Any]:
    async with session.post(url, json=body, headers=headers) as response:
        assert response.status == 200, await response.text()
        text = await response.text()
    events = [event.removeprefix("data: ") for event in text.split("\n\n") if event]
    assert events[-1] == "[DONE]"
    return [json.loads(event) for event in events[:-1]]


def text_of(events: list[Any]) -> str:
    choices = [event["choices"][0] for event in events if event.get("choices")]
    return "".join(each.get("text") or each.get("delta", {}).get("content") or "" for each in choices)


def check_one_stream(events: list[Any], route: str, *, usage_asked: bool) -> None:
    """One answer by all that a client can see."""
    assert not [event for event in events if "error" in event]
    assert len({(event["id"], event["created"], event["model"]) for event in events}) == 1
    choices = [event["choices"][0] for event in events if event["choices"]]
    assert [choice["finish_reason"] for choice in choices if choice["finish_reason"]] == ["length"]
    if route == CHAT:
        assert [number for number, each in enumerate(choices) if "role" in each["delta"]] == [0]
    told = [event["usage"] for event in events if "usage" in event]
    assert len(told) == usage_asked
    assert all(usage["completion_tokens"] == TOKENS for usage in told)


async def two(stack: AsyncExitStack, *flags: str, **options: Any) -> tuple[list[Simulator], Cluster]:
    dying = await stack.enter_async_context(simulator(*flags))
    other = await stack.enter_async_context(simulator())
    made = cluster(
        urls=[dying.url, other.url],
        stream_continuation=options.pop("stream_continuation", True),
        engine=types_pb2.ENGINE_SIMULATOR,
        **options,
    )
    return [dying, other], await stack.enter_async_context(made)


@pytest.mark.parametrize("route", [CHAT, "/v1/completions"])
@pytest.mark.parametrize("usage_asked", [True, False])
async def test_an_engine_that_reports_its_death_mid_stream(route: str, usage_asked: bool) -> None:
    body = request_of(route, **({"stream_options": {"include_usage": True}} if usage_asked else {}))
    async with AsyncExitStack() as stack:
        engines, it = await two(stack, "--mid-stream-death-after-tokens", "17")
        undisturbed = await read(it.client, engines[1].url + route, body)
        events = await read(it.client, it.url + route, body, it.headers)
        assert text_of(events) == text_of(undisturbed)
        check_one_stream(events, route, usage_asked=usage_asked)
        (usage,) = it.usages
        assert usage.outcome is UsageOutcome.COMPLETE
        assert usage.counts.exact
        assert usage.counts.completion == TOKENS
        assert it.router.director.health.is_ejected(it.router.source.view.endpoints[0])
        assert await it.metric('millrace_router_retries_total{cause="stream_failed"}') == 1
        assert it.router.director.loads.total == 0


async def test_an_engine_killed_under_a_load_of_streams_costs_none_of_them() -> None:
    async with AsyncExitStack() as stack:
        engines, it = await two(stack, strategy="least-pending")
        bodies = [
            request_of(route, **({"stream_options": {"include_usage": True}} if number % 3 else {}))
            for number in range(20)
            for route in (CHAT, "/v1/completions")
        ]
        expected = {route: text_of(await read(it.client, engines[1].url + route, request_of(route)))
                    for route in (CHAT, "/v1/completions")}  # fmt: skip
        tasks = [
            asyncio.create_task(
                read(
                    it.client, it.url + (CHAT if "messages" in body else "/v1/completions"), body, it.headers
                )
            )
            for body in bodies
        ]
        await eventually(lambda: it.router.director.loads.in_flight("chat-0") >= 10, interval_seconds=0.005)
        await asyncio.sleep(0.1)
        await engines[0].kill()
        for body, events in zip(bodies, await asyncio.gather(*tasks), strict=True):
            route = CHAT if "messages" in body else "/v1/completions"
            assert text_of(events) == expected[route]
            check_one_stream(events, route, usage_asked="stream_options" in body)
        assert len(it.usages) == len(bodies)
        assert all(usage.counts.exact and usage.counts.completion == TOKENS for usage in it.usages)
        assert await it.metric('millrace_router_retries_total{cause="stream_broken"}') >= 10


@pytest.mark.parametrize(
    "more",
    [{"n": 1, "presence_penalty": 0.5}, {"logprobs": True}, {"unheard_of": 1}],
    ids=lambda each: next(iter(each)),
)
async def test_a_request_that_cannot_be_continued_ends_in_an_error(more: dict[str, Any]) -> None:
    async with AsyncExitStack() as stack:
        _, it = await two(stack, "--mid-stream-death-after-tokens", "3")
        events = await read(it.client, it.url + CHAT, request_of(CHAT, **more), it.headers)
        assert "error" in events[-1]
        assert [usage.outcome for usage in it.usages] == [UsageOutcome.FAILED]
        assert it.usages[0].counts.completion == 3


@pytest.mark.parametrize("on", [False, True], ids=["off", "nobody-left"])
async def test_where_nobody_goes_on_the_client_gets_the_engines_word(on: bool) -> None:
    async with (
        simulator("--mid-stream-death-after-tokens", "3") as engine,
        cluster(urls=[engine.url], stream_continuation=on, engine=types_pb2.ENGINE_SIMULATOR) as it,
    ):
        events = await read(it.client, it.url + CHAT, request_of(CHAT), it.headers)
        assert len([event for event in events if "error" in event]) == 1
        assert events[-1]["error"]["code"] == 500
        (usage,) = it.usages
        assert (usage.outcome, usage.counts.completion) == (UsageOutcome.FAILED, 3)
        assert await it.metric('millrace_router_requests_total{reason="engine_error"') == 1
        assert await it.metric('millrace_router_upstream_errors_total{owner="engine"}') == 1
        failed = it.router.director.health.last_failure_seconds(it.router.source.view.endpoints[0])
        assert failed > float("-inf")
