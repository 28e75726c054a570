"""Measures how long the cluster goes without decisions when its leader is gone, by three ways of being gone.

At the moment of the harm a user declares one more replica at the other control plane, and an engine is
killed: the lead has been taken over in earnest when the one is assigned and the other is replaced.
"""

import asyncio
import os
import signal
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from core.store import keys
from tests.chaos.cluster import DEPLOYMENT, NAMESPACE, ChaosCluster, ControlPlane
from tests.chaos.faults import cut, first_node, kill, leading, pause
from tests.chaos.invariants import SPEC, look
from tests.chaos.runner import CLIENTS, PAUSE_SECONDS, converged
from tests.support.load import steady_load
from tests.support.waiting import eventually

WAYS = {"kill -9": kill(leading), "SIGSTOP": pause(leading), "cut off from etcd": cut(leading)}
TAKE_OVER_SECONDS_MAX = 15.0
CONVERGE_SECONDS = 40.0


@dataclass(frozen=True, slots=True)
class TakeOver:
    """Seconds after the harm, and the load that went on.

    Attributes:
        elected: When another control plane held the lead.
        assigned: When it had assigned the first replica.
        replaced: When the engine that was killed at that moment was replaced and the declaration fulfilled.
        requests: Requests of the load.
        failed: Those that did not get a whole completion.
    """

    elected: float
    assigned: float
    replaced: float
    requests: int
    failed: int


async def _seconds_until(began: float, holds: Callable[[], Awaitable[object]]) -> float:
    await eventually(holds, timeout_seconds=TAKE_OVER_SECONDS_MAX, interval_seconds=0.01)
    return time.monotonic() - began


async def _declare_one_more(cluster: ChaosCluster, at: ControlPlane, replicas: int) -> None:
    path = f"{at.gateway_url}/v1/deployments/{NAMESPACE}/{DEPLOYMENT}"
    async with cluster.http.patch(path, json={"replicas": replicas}) as answer:
        assert answer.status == 200, await answer.text()


async def take_over(cluster: ChaosCluster, way: str) -> TakeOver:
    """Takes the leader away and measures; the cluster has converged before and after."""
    leader, other = await cluster.leader(), await cluster.follower()
    before = await look(cluster)
    count = len(before.assignments)
    headers = {"Authorization": f"Bearer {cluster.api_key}"}
    async with steady_load(
        cluster.router_url, headers, model=DEPLOYMENT, clients=CLIENTS, pause_seconds=PAUSE_SECONDS
    ) as load:
        await asyncio.sleep(1)
        victim, process = next(iter((await first_node(cluster)).engines().items()))
        began = time.monotonic()
        heal = await WAYS[way](cluster)
        os.killpg(process.pid, signal.SIGKILL)
        await _declare_one_more(cluster, other, count + 1)

        async def elected() -> bool:
            found = await cluster.store.get(keys.LIVE_LEADER)
            return found is not None and other.member_id.encode() in found.value

        async def assigned() -> bool:
            return len(set((await look(cluster)).assignments) - set(before.assignments)) >= 1

        async def replaced() -> bool:
            now = (await look(cluster)).assignments
            return victim not in now and len(now) == count + 1

        elected_seconds, assigned_seconds, replaced_seconds = await asyncio.gather(
            *(_seconds_until(began, each) for each in (elected, assigned, replaced))
        )
        await heal()
        await converged(cluster, (await look(cluster)).below(SPEC), CONVERGE_SECONDS)
    assert (await cluster.leader()) is not leader or way == "kill -9"
    await _declare_one_more(cluster, other, count)
    await converged(cluster, (await look(cluster)).below(SPEC), CONVERGE_SECONDS)
    return TakeOver(
        elected_seconds, assigned_seconds, replaced_seconds, len(load.outcomes), len(load.failures)
    )
