"""Usage as the router counts it against the engine's own counters, and what clients see of it."""

import asyncio
import json
from typing import Any

import aiohttp
import pytest
from millrace.core.v1 import types_pb2

from router.metering.usage import TokenCounts, UsageOutcome
from tests.support.fake_engine import Behaviour, FakeEngine, answers, streams
from tests.support.router_cluster import DEPLOYMENT, Cluster, cluster
from tests.support.simulators import Simulator, simulator
from tests.support.waiting import eventually

pytestmark = pytest.mark.integration

CHAT = "/v1/chat/completions"
PROMPT_TOKENS = "vllm:prompt_tokens_total"
GENERATED_TOKENS = "vllm:generation_tokens_total"
# A step of the simulator is one token a sequence.
STEP_TOKENS = 1


def body(**more: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": "Tell me about mills"}]
    return {"model": DEPLOYMENT, "messages": messages, "max_tokens": 12, **more}


async def post(it: Cluster, path: str, document: Any) -> str:
    async with it.client.post(it.url + path, json=document, headers=it.headers) as response:
        return await response.text()


async def totals(engine: Simulator) -> tuple[int, int]:
    return int(await engine.counter(PROMPT_TOKENS)), int(await engine.counter(GENERATED_TOKENS))


async def test_no_difference_to_the_engines_counters() -> None:
    async with (
        simulator("--enable-prompt-tokens-details") as engine,
        cluster(urls=[engine.url], engine=types_pb2.ENGINE_SIMULATOR) as it,
    ):
        requests = [
            (CHAT, body(stream=True)),
            (CHAT, body(stream=True, stream_options={"include_usage": True})),
            (CHAT, body(stream=True, stream_options={"include_usage": True, "continuous_usage_stats": True})),
            (CHAT, body()),
            (
                "/v1/completions",
                {"model": DEPLOYMENT, "prompt": "Mills and", "max_tokens": 7, "stream": True},
            ),
            ("/v1/completions", {"model": DEPLOYMENT, "prompt": "Mills and", "max_tokens": 7}),
        ]
        texts = await asyncio.gather(*(post(it, path, document) for path, document in requests * 3))
        for (_, document), text in zip(requests * 3, texts, strict=True):
            asked = document.get("stream_options", {"include_usage": not document.get("stream")})
            assert ('"usage":{' in text) is asked["include_usage"]
        assert len(it.usages) == len(texts)
        assert all(each.counts.exact and each.outcome is UsageOutcome.COMPLETE for each in it.usages)
        counted = (
            sum(each.counts.prompt or 0 for each in it.usages),
            sum(each.counts.completion or 0 for each in it.usages),
        )
        assert counted == await totals(engine)
        assert sum(each.counts.cached or 0 for each in it.usages) == await engine.counter(
            "vllm:prompt_tokens_cached_total"
        )
        assert await it.metric('millrace_router_tokens_total{kind="completion"') == counted[1]
        await post(it, "/v1/embeddings", {"model": DEPLOYMENT, "input": "Mills and races"})
        assert it.usages[-1].counts == TokenCounts(3, 0, None, exact=True)


async def test_clients_that_leave_are_counted_to_the_last_chunk_they_were_sent() -> None:
    async with (
        simulator(inter_token_latency_ms=10) as engine,
        cluster(urls=[engine.url], engine=types_pb2.ENGINE_SIMULATOR) as it,
    ):

        async def leave(events: int) -> None:
            async with it.client.post(
                it.url + CHAT, json=body(stream=True, max_tokens=400), headers=it.headers
            ) as response:
                for _ in range(events):
                    await response.content.readuntil(b"\n\n")

        await asyncio.gather(*(leave(events) for events in (2, 3, 5, 8)))
        await eventually(lambda: len(it.usages) == 4)
        assert {each.outcome for each in it.usages} == {UsageOutcome.CLIENT_GONE}
        assert all(each.counts.exact for each in it.usages)
        running = "vllm:num_requests_running"

        async def idle() -> bool:
            return await engine.counter(running) == 0

        await eventually(idle)
        prompt, generated = await totals(engine)
        assert prompt == sum(each.counts.prompt or 0 for each in it.usages)
        counted = sum(each.counts.completion or 0 for each in it.usages)
        # What an engine computes until it hears that the client has left, nobody has had.
        assert 0 <= generated - counted <= 4 * 2 * STEP_TOKENS
        (line,) = {each.key_hash_prefix for each in it.usages}
        assert len(line) == 12


ERROR = b'data: {"error":{"message":"EngineCore encountered an issue.","code":500}}\n\n'
CLIENTS_ERROR = b'data: {"error":{"message":"too long","type":"BadRequestError","code":400}}\n\n'
EVENT = b'data: {"id":"1","choices":[{"index":0,"delta":{"content":"a"},"finish_reason":null}]}\n\n'
DONE = b"data: [DONE]\n\n"


@pytest.mark.parametrize(
    ("behaviour", "outcome", "reason", "owner"),
    [
        (streams([EVENT, ERROR, DONE]), UsageOutcome.FAILED, "engine_error", "engine"),
        (streams([EVENT, CLIENTS_ERROR, DONE]), UsageOutcome.FAILED, "engine_client_error", "client"),
        (answers(400, b'{"error":{}}'), UsageOutcome.FAILED, "engine_client_error", "client"),
        (streams([EVENT, DONE]), UsageOutcome.COMPLETE, "ok", None),
    ],
    ids=["engine's", "client's", "refused", "none"],
)
async def test_errors_inside_a_stream_are_failures_of_their_owner(
    behaviour: Behaviour, outcome: UsageOutcome, reason: str, owner: str | None
) -> None:
    async with FakeEngine(behaviour) as engine, cluster(urls=[engine.url]) as it:
        text = await post(it, CHAT, body(stream=True))
        assert text.endswith("[DONE]\n\n") or "error" in text
        (usage,) = it.usages
        assert usage.outcome is outcome
        assert not usage.counts.exact
        assert await it.metric(f'millrace_router_requests_total{{reason="{reason}"') == 1
        for each in ("engine", "client", "transport"):
            counted = await it.metric(f'millrace_router_upstream_errors_total{{owner="{each}"}}')
            assert counted == (each == owner)
        ejected = it.router.director.health.is_ejected(it.router.source.view.endpoints[0])
        assert ejected == (owner == "engine")


@pytest.mark.parametrize(
    ("engine", "options"),
    [
        (types_pb2.ENGINE_VLLM, {"include_usage": True, "continuous_usage_stats": True}),
        (types_pb2.ENGINE_EXTERNAL, {"include_usage": True}),
    ],
)
async def test_engines_are_asked_for_what_they_know(engine: types_pb2.Engine.ValueType, options: Any) -> None:
    async with FakeEngine(streams([EVENT, DONE])) as fake, cluster(urls=[fake.url], engine=engine) as it:
        sent = json.dumps(body(stream=True)).encode()
        async with it.client.post(it.url + CHAT, data=sent, headers=it.headers) as response:
            assert await response.read() == EVENT + DONE
        assert fake.requests[0].json["stream_options"] == options
        assert fake.requests[0].body.startswith(sent[:-1])
        await post(it, CHAT, body())
        assert "stream_options" not in fake.requests[1].json


async def test_a_request_that_no_engine_got_has_no_usage() -> None:
    async with cluster() as it, aiohttp.ClientSession():
        await post(it, CHAT, body())
        assert it.usages == []
