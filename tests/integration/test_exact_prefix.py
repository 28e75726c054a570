"""The exact prefix index through real parts: simulated engines, their agent, a router that follows both."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from millrace.core.v1 import endpoint_pb2

from router.picking.contract import CacheKnowledge, Candidate
from tests.integration.test_nodeagent import World
from tests.support.fleet import simulator_assignment
from tests.support.router_cluster import Cluster, cluster, endpoint_record
from tests.support.waiting import eventually

pytestmark = pytest.mark.integration
WORDS = "It was a dark and stormy night; the rain fell in torrents, except at occasional intervals. "


@pytest_asyncio.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    world = World(tmp_path)
    world.port = await world.fleet.start()
    try:
        yield world
    finally:
        if world.running is not None:
            await world.running.end()
        await world.fleet.stop()


def _record(world: World, replica: str, target: str) -> endpoint_pb2.Endpoint:
    observed = world.fleet.latest[replica]
    record = endpoint_record(replica, observed.url, incarnation=observed.incarnation)
    record.agent_target = target
    return record


async def _chat(it: Cluster, text: str) -> tuple[str, dict[str, Any], int]:
    """Sends a chat; returns who answered, the usage, and the tokens that the router took it for."""
    body = {"model": "chat", "messages": [{"role": "user", "content": text}], "max_tokens": 2}
    async with it.client.post(f"{it.url}/v1/chat/completions", json=body, headers=it.headers) as response:
        assert response.status == 200, await response.text()
        content = await response.json()
    kept = it.router.director.candidates.decisions.find(response.headers["x-request-id"])
    assert kept is not None
    return response.headers["x-millrace-endpoint"], content["usage"], kept.steps[-1].context.prompt.tokens


def _candidates(it: Cluster) -> dict[str, Candidate]:
    decision = it.router.director.candidates.selectors.default.decision
    assert decision is not None
    return {each.endpoint.replica: each for each in decision.candidates()}


async def test_a_pick_foretells_what_the_engine_takes_from_its_cache(world: World, tmp_path: Path) -> None:
    token = tmp_path / "router-token"
    token.write_text("token-of-routers")
    running = await world.start_agent(router_token_file=token, stop_engines_on_exit=True)
    names = ("chat-a", "chat-b")
    flags = {"kv_events": True, "enable_prompt_tokens_details": True}
    world.fleet.assign(*(simulator_assignment(name, **flags) for name in names))
    for name in names:
        await world.ready(name)
    target = f"127.0.0.1:{running.agent.grpc_port}"
    async with cluster(strategy="default", prefix_index="exact", agent_token_file=token) as it:
        exact = it.router.director.candidates.selectors.default.exact
        assert exact is not None
        exact._tokenizer._wait_seconds = 5.0  # a busy machine must not decide what this test sees
        await it.publish(*(_record(world, name, target) for name in names))
        first, _, _ = await _chat(it, WORDS * 3)
        # Nothing is known of an engine that has not cached anything yet.
        other = next(each for each in names if each != first)
        await eventually(lambda: exact.blocks_at(first) > 0)
        for turn in range(4, 8):
            blocks = exact.blocks_at(first)
            answered, usage, taken_for = await _chat(it, WORDS * turn)
            seen = _candidates(it)
            assert answered == first
            assert seen[first].cache_knowledge is CacheKnowledge.EXACT
            assert seen[first].cached_tokens == usage["prompt_tokens_details"]["cached_tokens"] > 0
            assert taken_for == usage["prompt_tokens"]
            assert seen[other].cached_tokens == 0
            await eventually(lambda blocks=blocks: exact.blocks_at(first) > blocks)

        # The engine restarts: another incarnation, of which nothing is known.
        record = _record(world, first, target)
        record.incarnation = "another run"
        await it.publish(record)
        await _chat(it, WORDS * 8)
        assert _candidates(it)[first].cached_tokens == 0
        assert _candidates(it)[first].cache_knowledge is CacheKnowledge.APPROXIMATE


async def test_requests_go_on_without_the_agent_and_without_tokens(world: World, tmp_path: Path) -> None:
    token = tmp_path / "router-token"
    token.write_text("token-of-routers")
    running = await world.start_agent(router_token_file=token, stop_engines_on_exit=True)
    world.fleet.assign(simulator_assignment("chat-a", kv_events=True))
    await world.ready("chat-a")
    wrong = tmp_path / "wrong-token"
    wrong.write_text("token-of-nobody")
    target = f"127.0.0.1:{running.agent.grpc_port}"
    async with cluster(strategy="default", prefix_index="exact", agent_token_file=wrong) as it:
        await it.publish(_record(world, "chat-a", target))
        await _chat(it, WORDS * 3)
        answered, _, _ = await _chat(it, WORDS * 4)
        assert answered == "chat-a"
        seen = _candidates(it)["chat-a"]
        assert seen.cache_knowledge is CacheKnowledge.APPROXIMATE
        assert seen.cached_tokens > 0
