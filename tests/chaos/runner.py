"""Runs one fault: load, harm, healing, and the wait until everything holds again.

In come a cluster and a fault, out comes an account of what it cost. A way back that takes longer than its
bound, or a device that is given away twice at any moment, is an error.
"""

import asyncio
import itertools
import time
from contextlib import suppress
from dataclasses import dataclass

from core.store import StoreError
from core.tasks import cancel_and_wait
from tests.chaos.cluster import DEPLOYMENT, NAMESPACE, ChaosCluster
from tests.chaos.faults import Fault
from tests.chaos.invariants import SPEC, World, look, overplaced, unmet
from tests.support.load import Load, steady_load
from tests.support.waiting import eventually

CLIENTS = 4
PAUSE_SECONDS = 0.05
# Load before the harm, so that a gap is seen as one.
WARM_SECONDS = 0.5
# Everything must hold for as long before it counts: a cluster that is about to react has not converged.
STEADY_SECONDS = 0.5
LOOK_SECONDS = 0.1
DECLARE_SECONDS = 20.0
PROBE = "probe"


@dataclass(frozen=True, slots=True)
class Account:
    """What a fault cost.

    Attributes:
        fault: Its name.
        requests: Requests of the load, from before the harm to after the healing.
        failed: Those that did not get a whole completion.
        gap_seconds: Longest time without a completion.
        replaced: Replicas that are gone.
        replicas: Replicas that there were.
        slowest_seconds: The request that took longest.
        converge_seconds: From the end of the harm until everything held and a new declaration served.
        errors: What failed requests were told, a few of them.
    """

    fault: str
    requests: int
    failed: int
    gap_seconds: float
    slowest_seconds: float
    replaced: int
    replicas: int
    converge_seconds: float
    errors: tuple[str, ...]

    @property
    def lost(self) -> str:
        """What was lost, in words."""
        return f"{self.replaced} of {self.replicas} replicas, replaced" if self.replaced else "nothing"


async def converged(cluster: ChaosCluster, spec: dict[str, bytes], within_seconds: float) -> None:
    """Waits until everything has held for a while.

    Raises:
        AssertionError: It does not within the bound; with what does not hold.
    """
    began = time.monotonic()
    holds_since: float | None = None
    problems: list[str] = ["nobody looked"]
    while True:
        try:
            async with asyncio.timeout(2 * LOOK_SECONDS + 5):
                problems = await unmet(cluster, spec)
        except (StoreError, TimeoutError) as error:
            problems = [f"etcd cannot be read: {error}"]
        now = time.monotonic()
        if problems:
            holds_since = None
        elif holds_since is None:
            holds_since = now
        elif now - holds_since >= STEADY_SECONDS:
            return
        if holds_since is None and now - began > within_seconds:
            lines = "\n  ".join(problems)
            raise AssertionError(f"not converged within {within_seconds:.0f} s:\n  {lines}\n{cluster.logs()}")
        await asyncio.sleep(LOOK_SECONDS)


async def _declared(cluster: ChaosCluster, name: str) -> None:
    """Declares something new, at the first control plane that takes it."""
    deadline = time.monotonic() + DECLARE_SECONDS
    while True:
        try:
            await cluster.declare(name, replicas=len(cluster.nodes))
        except AssertionError:
            if time.monotonic() > deadline:
                raise
            await asyncio.sleep(LOOK_SECONDS)
        else:
            return


async def _recovered(cluster: ChaosCluster, fault: Fault, spec: dict[str, bytes]) -> float:
    """Waits until everything holds and something new can be declared and serves; returns after how long.

    A cluster in which nobody decides any more would hold still, too: that is why something is asked of it.
    """
    began = time.monotonic()
    await _declared(cluster, PROBE)
    now = (await look(cluster)).below(SPEC)
    assert spec.items() <= now.items(), "what users had declared was changed"
    await converged(cluster, now, fault.converge_seconds)
    took = time.monotonic() - began - STEADY_SECONDS
    await cluster.call("DELETE", f"/v1/deployments/{NAMESPACE}/{PROBE}")
    await converged(cluster, spec, fault.converge_seconds)
    return took


async def _watch_devices(cluster: ChaosCluster, found: list[str]) -> None:
    """Looks at every moment whether a device was given away twice."""
    while True:
        with suppress(StoreError):
            found.extend(overplaced(await look(cluster)))
        await asyncio.sleep(LOOK_SECONDS)


async def run_fault(cluster: ChaosCluster, fault: Fault, *, hold_seconds: float | None = None) -> Account:
    """Runs one fault on a cluster that has converged.

    Raises:
        AssertionError: It did not come back, lost what it must not lose, or gave a device away twice.
    """
    before = await look(cluster)
    spec = before.below(SPEC)
    twice: list[str] = []
    watching = asyncio.create_task(_watch_devices(cluster, twice), name="watch-devices")
    headers = {"Authorization": f"Bearer {cluster.api_key}"}
    try:
        async with steady_load(
            cluster.router_url, headers, model=DEPLOYMENT, clients=CLIENTS, pause_seconds=PAUSE_SECONDS
        ) as load:
            await asyncio.sleep(WARM_SECONDS)
            heal = await fault.inject(cluster)
            try:
                await asyncio.sleep(fault.hold_seconds if hold_seconds is None else hold_seconds)
            finally:
                await heal()
            took = await _recovered(cluster, fault, spec)
            moment = time.monotonic()
            await eventually(
                lambda: load.succeeded_since(moment) >= CLIENTS,
                timeout_seconds=20,
                message=f"the router does not serve again\n{cluster.logs()}",
            )
    finally:
        await cancel_and_wait(watching)
    assert not twice, twice
    return _account(fault, load, before, await look(cluster), took)


def _account(fault: Fault, load: Load, before: World, after: World, took: float) -> Account:
    gone = set(before.assignments) - set(after.assignments)
    assert fault.loses_replicas or not gone, f"{fault.name}: replicas {sorted(gone)} are gone"
    ends = sorted(each.ended for each in load.outcomes if not each.failed)
    return Account(
        fault=fault.name,
        requests=len(load.outcomes),
        failed=len(load.failures),
        gap_seconds=max((later - earlier for earlier, later in itertools.pairwise(ends)), default=0.0),
        slowest_seconds=max(each.ended - each.began for each in load.outcomes),
        replaced=len(gone),
        replicas=len(before.assignments),
        converge_seconds=took,
        errors=tuple(sorted({f"{each.status} {each.error[:200]}" for each in load.failures}))[:3],
    )
