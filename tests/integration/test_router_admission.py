"""Waiting for room between real sockets: the line, its end, tiers, fall-back, aliases, parking, and why."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest
from google.protobuf import duration_pb2
from millrace.core.v1 import policy_pb2, types_pb2
from millrace.state.v1 import records_pb2

from core.store import keys
from router.view.view import Deployment
from tests.support.fake_engine import Behaviour, Exchange, FakeEngine, answers, first_of, resets
from tests.support.router_cluster import DEPLOYMENT, NAMESPACE, Cluster, cluster, endpoint_record
from tests.support.waiting import eventually

OK = b'{"id": "chatcmpl-1", "choices": []}'
ADMIN = {"Authorization": "Bearer admin-token"}


class Valve:
    """Answers when it is told to, one request a turn."""

    def __init__(self) -> None:
        self._turns = asyncio.Semaphore(0)

    def turn(self, times: int = 1) -> None:
        for _ in range(times):
            self._turns.release()

    @property
    def behaviour(self) -> Behaviour:
        answer = answers(200, OK)

        async def behave(exchange: Exchange) -> None:
            await first_of(self._turns.acquire(), exchange.hung_up.wait())
            if not exchange.hung_up.is_set():
                await answer(exchange)

        return behave


@asynccontextmanager
async def _saturated(**options: Any) -> AsyncIterator[tuple[Cluster, FakeEngine, Valve]]:
    """One engine that runs one request at once, has one waiting inside, and is known to take no more."""
    valve = Valve()
    async with (
        FakeEngine(valve.behaviour) as engine,
        cluster(urls=[engine.url], **options) as it,
        asyncio.TaskGroup() as group,
    ):
        first = [group.create_task(_ask(it)) for _ in range(2)]
        await eventually(lambda: engine.active == 2)
        limits = it.router.director.candidates.gate.saturation.limits
        for _ in range(3):
            seen = it.router.source.samples.age_seconds("chat-0")
            await it.sample("chat-0", running=1, waiting=1)
            await eventually(lambda seen=seen: it.router.source.samples.age_seconds("chat-0") != seen)
        await eventually(lambda: limits == {"chat-0": 2})
        yield it, engine, valve
        valve.turn(100)
        await asyncio.gather(*first)


async def _ask(it: Cluster, *, key: str = "", **body: Any) -> tuple[int, Mapping[str, str], Any]:
    document = {"model": DEPLOYMENT, "messages": [], **body}
    headers = {"Authorization": f"Bearer {key}"} if key else it.headers
    async with it.client.post(f"{it.url}/v1/chat/completions", json=document, headers=headers) as response:
        return response.status, response.headers, await response.json()


def _waiting(it: Cluster) -> tuple[int, int]:
    return it.router.director.candidates.gate.waiting()


async def test_a_saturated_deployment_queues_and_then_refuses_with_a_time() -> None:
    async with _saturated(queue_requests_max=2) as (it, engine, valve):
        queued = [asyncio.create_task(_ask(it)) for _ in range(2)]
        await eventually(lambda: _waiting(it) == (2, 0))
        status, headers, document = await _ask(it)
        assert (status, headers["x-millrace-reason"]) == (429, "queue_full")
        assert 1 <= int(headers["Retry-After"]) <= 60
        assert document["error"]["type"] == "rate_limit_error"
        assert "2 request(s) wait" in document["error"]["message"]
        assert engine.active == 2
        assert await it.metric("millrace_router_queued_requests") == 2
        valve.turn()
        # One place was freed, one waiter has it.
        await eventually(lambda: len(engine.requests) == 3)
        assert _waiting(it) == (1, 0)
        valve.turn(3)
        assert [status for status, _, _ in await asyncio.gather(*queued)] == [200, 200]
        assert it.router.director.loads.total == 0


async def test_a_wait_ends_with_its_time_or_with_the_client() -> None:
    async with _saturated(queue_timeout_seconds=0.3) as (it, engine, _valve):
        status, headers, _ = await _ask(it)
        assert (status, headers["x-millrace-reason"]) == (429, "queue_timeout")
        leaves = asyncio.create_task(_ask(it))
        await eventually(lambda: _waiting(it) == (1, 0))
        leaves.cancel()
        with pytest.raises(asyncio.CancelledError):
            await leaves
        await eventually(lambda: _waiting(it) == (0, 0))
        assert it.router.director.candidates.gate.waiting_bytes == 0
        assert len(engine.requests) == 2


async def test_the_fast_tier_goes_first_and_a_priority_within_it() -> None:
    async with _saturated() as (it, engine, valve):
        fast = await it.make_key(NAMESPACE, types_pb2.TIER_FAST)
        await eventually(lambda: len(it.router.source.view.api_keys) == 2)
        waits = []
        for number, (key, priority) in enumerate([("", 0), (fast, 5), (fast, -5)]):
            waits.append(asyncio.create_task(_ask(it, key=key, user=f"{number}", priority=priority)))
            await eventually(lambda number=number: _waiting(it) == (number + 1, 0))
        for expected in range(3, 6):
            valve.turn()
            await eventually(lambda expected=expected: len(engine.requests) == expected)
        assert [each.json["user"] for each in engine.requests[2:]] == ["2", "1", "0"]
        valve.turn(5)
        await asyncio.gather(*waits)


async def test_a_fallback_serves_what_is_saturated_beyond_its_queue_or_absent() -> None:
    routing = policy_pb2.Routing(fallback_deployment="small", queue_requests_max=0)
    async with FakeEngine(answers(200, OK)) as small, _saturated() as (it, _, _valve):
        await it.declare(DEPLOYMENT, routing=routing)
        # A chain that leads back ends where it began.
        await it.declare("small", routing=policy_pb2.Routing(fallback_deployment=DEPLOYMENT))
        await it.publish(endpoint_record("small-0", small.url, deployment="small"))
        await eventually(lambda: _routing(it, DEPLOYMENT).fallback == "small")
        status, headers, _ = await _ask(it)
        assert (status, headers["x-millrace-reason"]) == (200, "fallback")
        assert headers["x-millrace-deployment"] == "small"
        assert small.requests[0].json["model"] == "small"
        await it.withdraw("chat-0")
        await eventually(lambda: len(it.router.source.view.endpoints) == 1)
        status, headers, _ = await _ask(it)
        assert (status, headers["x-millrace-endpoint"]) == (200, "small-0")
        # It wants its own deployment woken up all the same.
        parked = {
            each.deployment: each.parked_requests for each in it.router.director.candidates.gate.demand()
        }
        assert parked[DEPLOYMENT] == 1
        small.behaviour = resets
        status, headers, _ = await _ask(it)
        assert (status, headers["x-millrace-reason"]) == (503, "all_endpoints_failed")


async def test_a_fallback_serves_what_all_endpoints_fail() -> None:
    async with FakeEngine(resets) as broken, FakeEngine(answers(200, OK)) as small, cluster() as it:
        await it.declare(DEPLOYMENT, routing=policy_pb2.Routing(fallback_deployment="small"))
        await it.declare("small")
        await it.publish(
            endpoint_record("chat-0", broken.url),
            endpoint_record("small-0", small.url, deployment="small"),
        )
        status, headers, _ = await _ask(it)
        assert (status, headers["x-millrace-reason"]) == (200, "retry")
        assert headers["x-millrace-deployment"] == "small"


async def test_an_alias_splits_by_weight_and_keeps_sessions() -> None:
    async with AsyncExitStack() as stack:
        engines = [await stack.enter_async_context(FakeEngine(answers(200, OK))) for _ in range(2)]
        it = await stack.enter_async_context(cluster())
        for name, engine in zip(("new", "old"), engines, strict=True):
            await it.declare(name)
            await it.publish(endpoint_record(f"{name}-0", engine.url, deployment=name))
        targets = [
            policy_pb2.AliasTarget(deployment="new", weight=20),
            policy_pb2.AliasTarget(deployment="old", weight=80),
        ]
        spec = policy_pb2.NamespaceSpec(aliases=[policy_pb2.ModelAlias(name="org/chat", targets=targets)])
        await it.put(
            keys.spec_namespace(NAMESPACE), records_pb2.NamespaceRecord(namespace=NAMESPACE, spec=spec)
        )
        await eventually(lambda: bool(it.router.source.view.tenants[NAMESPACE].aliases))
        got: Counter[str] = Counter()
        for _ in range(20):
            found = await asyncio.gather(*(_ask(it, model="org/chat") for _ in range(50)))
            got.update(headers["x-millrace-deployment"] for _, headers, _ in found)
        assert got == {"new": 200, "old": 800}
        assert engines[0].requests[0].json["model"] == "new"
        homes = {(await _ask(it, model="org/chat", user="me"))[1]["x-millrace-deployment"] for _ in range(20)}
        assert len(homes) == 1
        async with it.client.get(f"{it.url}/v1/models", headers=it.headers) as response:
            listed = [each["id"] for each in (await response.json())["data"]]
        assert listed == ["chat", "new", "old", "org/chat"]
        async with it.client.get(f"{it.url}/v1/models/org/chat", headers=it.headers) as response:
            assert (await response.json())["id"] == "org/chat"


async def test_requests_park_until_the_first_endpoint_comes() -> None:
    async with FakeEngine(answers(200, OK)) as engine, cluster(parking_timeout_seconds=30) as it:
        parked = [asyncio.create_task(_ask(it)) for _ in range(3)]
        await eventually(lambda: _waiting(it) == (0, 3))
        assert it.router.director.candidates.gate.parked.is_set()
        await it.publish(endpoint_record("chat-0", engine.url))
        assert {status for status, _, _ in await asyncio.gather(*parked)} == {200}
        # A deployment that its user has stopped will not come, so that nobody waits for it.
        await it.declare("stopped", replicas=0)
        await eventually(lambda: "stopped" in it.router.source.view.tenants[NAMESPACE].deployments)
        status, headers, _ = await _ask(it, model="stopped")
        assert (status, headers["x-millrace-reason"]) == (503, "no_endpoint_available")


async def test_parking_has_bounds_and_tells_when_to_come_again() -> None:
    async with cluster(parking_timeout_seconds=30, expected_start_seconds=40) as it:
        routing = policy_pb2.Routing(
            queue_requests_max=1, queue_timeout=duration_pb2.Duration(nanos=300_000_000)
        )
        await it.declare(DEPLOYMENT, routing=routing)
        await eventually(lambda: _routing(it, DEPLOYMENT).queue_requests_max == 1)
        parked = asyncio.create_task(_ask(it))
        await eventually(lambda: _waiting(it) == (0, 1))
        status, headers, document = await _ask(it)
        assert (status, headers["x-millrace-reason"]) == (503, "start_queue_full")
        assert 30 <= int(headers["Retry-After"]) <= 40
        assert "1 of at most 1 requests wait" in document["error"]["message"]
        status, headers, _ = await parked
        assert (status, headers["x-millrace-reason"]) == (503, "no_endpoint_available")
        assert 30 <= int(headers["Retry-After"]) <= 40


async def test_why_this_engine_is_told_to_operators() -> None:
    async with AsyncExitStack() as stack:
        broken = await stack.enter_async_context(FakeEngine(resets))
        engines = [await stack.enter_async_context(FakeEngine(answers(200, OK))) for _ in range(2)]
        it = await stack.enter_async_context(cluster(urls=[each.url for each in (broken, *engines)]))
        await it.declare(DEPLOYMENT, routing=policy_pb2.Routing(strategy="least-pending"))
        await eventually(lambda: _routing(it, DEPLOYMENT).strategy == "least-pending")
        found = [await _ask(it) for _ in range(3)]
        reasons = Counter(headers["x-millrace-reason"] for _, headers, _ in found)
        assert reasons == {"retry": 1, "least-pending": 2}
        (retried,) = [headers for _, headers, _ in found if headers["x-millrace-reason"] == "retry"]
        url = f"{it.url}/debug/decisions/{retried['x-request-id']}"
        async with it.client.get(url) as response:
            assert response.status == 401
        async with it.client.get(url, headers=ADMIN) as response:
            document = await response.json()
        assert (document["status"], document["attempts"]) == (200, 2)
        first, second = document["choices"]
        assert (first["strategy"], first["chosen"], second["why"]) == ("least-pending", "chat-0", "retry")
        rows = {each["replica"]: each for each in second["candidates"]}
        assert rows["chat-0"]["dropped_by"] == "breaker, or tried before"
        assert rows[second["chosen"]]["scores"]["LeastPending"]["score"] == 1.0
        async with it.client.get(f"{it.url}/debug/decisions/none", headers=ADMIN) as response:
            assert (response.status, response.headers["x-millrace-reason"]) == (404, "decision_unknown")


def _routing(it: Cluster, name: str) -> Any:
    found = it.router.source.view.deployment(NAMESPACE, name)
    assert isinstance(found, Deployment)
    return found.routing
