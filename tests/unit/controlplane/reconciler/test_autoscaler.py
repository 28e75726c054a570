from collections.abc import AsyncIterator
from typing import Any

import pytest_asyncio
from google.protobuf.duration_pb2 import Duration
from millrace.core.v1 import policy_pb2, stats_pb2, types_pb2
from millrace.state.v1 import records_pb2

from core.clock import to_timestamp
from core.store import Delete, keys
from core.store.memory import MemoryStore
from tests.support.clock import ManualClock
from tests.support.reconciled_cluster import NAMESPACE, ReconciledCluster

NAME = "qwen"


def policy(**changes: Any) -> policy_pb2.Autoscale:
    """A policy that waits half a minute where the defaults wait five."""
    half_a_minute = Duration(seconds=30)
    return policy_pb2.Autoscale(
        max_replicas=changes.pop("most", 4),
        cooldown_in=half_a_minute,
        idle_timeout=half_a_minute,
        thresholds=policy_pb2.AutoscaleThresholds(waiting_requests_in_period=half_a_minute),
        **changes,
    )


class Scene:
    """A cluster whose engines and routers report what the test says, once a second."""

    def __init__(self, cluster: ReconciledCluster, clock: ManualClock) -> None:
        self.cluster = cluster
        self.clock = clock
        self.waiting = 0
        self.silent: set[str] = set()
        self.demand: records_pb2.DeploymentDemand | None = records_pb2.DeploymentDemand()

    async def declare(self, autoscale: policy_pb2.Autoscale, *, replicas: int = 1) -> None:
        record = await self.cluster.declare(NAME, replicas=replicas, memory_gib=1)
        record.spec.autoscale.CopyFrom(autoscale)
        await self.cluster.put(keys.spec_deployment(NAMESPACE, NAME), record)

    async def change(self, **changes: Any) -> None:
        key = keys.spec_deployment(NAMESPACE, NAME)
        found = await self.cluster.store.get(key)
        assert found is not None
        record = records_pb2.DeploymentRecord.FromString(found.value)
        record.generation += 1
        for name, value in changes.items():
            if value is None:
                record.spec.ClearField(name)  # type: ignore[arg-type]
            elif name == "autoscale":
                record.spec.autoscale.CopyFrom(value)
            else:
                setattr(record.spec, name, value)
        await self.cluster.put(key, record)

    async def second(self) -> None:
        """Everybody reports, agents work, a second passes."""
        await self.cluster.agents_step()
        serving = [
            replica
            for replica, each in (await self.cluster.observations()).items()
            if each.state == types_pb2.REPLICA_STATE_READY and replica in await self.cluster.assignments()
        ]
        for replica in serving:
            if replica not in self.silent:
                sample = stats_pb2.EngineStats(
                    namespace=NAMESPACE,
                    deployment=NAME,
                    replica=replica,
                    sample_time=to_timestamp(self.clock.now()),
                    waiting_requests=self.waiting // max(1, len(serving)),
                    running_requests=0,
                    kv_usage_ratio=0.1,
                    # The machine has a CPU, on which others work, too.
                    device_utilization_ratio=1.0,
                )
                await self.cluster.put(keys.stats(NAMESPACE, NAME, replica), sample)
        await self.report_demand()
        await self.clock.advance(1)

    async def report_demand(self) -> None:
        router = records_pb2.RouterRecord(router_id="r1")
        if self.demand is None:
            await self.cluster.store.commit([Delete(keys.live_router("r1"))])
            return
        self.demand.namespace, self.demand.deployment = NAMESPACE, NAME
        router.demand.append(self.demand)
        await self.cluster.put(keys.live_router("r1"), router)

    async def pass_time(self, seconds: int) -> None:
        for _ in range(seconds):
            await self.second()

    async def desired(self) -> int:
        return (await self.cluster.status(NAME)).desired_replicas

    async def serving(self) -> int:
        return (await self.cluster.status(NAME)).ready_replicas


@pytest_asyncio.fixture
async def scene() -> AsyncIterator[Scene]:
    clock = ManualClock()
    store = MemoryStore(clock)
    async with ReconciledCluster(store, clock) as cluster:
        await cluster.add_node("node-1", memory_gib=64)
        yield Scene(cluster, clock)
    await store.close()


async def test_a_queue_adds_replicas_and_calm_takes_them_away(scene: Scene) -> None:
    await scene.declare(policy())
    await scene.pass_time(5)
    assert await scene.serving() == 1
    scene.waiting = 50
    await scene.pass_time(50)
    assert (await scene.desired(), await scene.serving()) == (3, 3)
    (step,) = scene.cluster.events.of("ScaledOut")
    assert "1 -> 3: " in str(step["message"])
    assert "requests wait" in str(step["message"])
    scene.waiting = 0
    await scene.pass_time(35)
    assert await scene.desired() == 2
    (step,) = scene.cluster.events.of("ScaledIn")
    assert "KV-cache use is 10.0%" in str(step["message"])
    # The user's number stays.
    found = await scene.cluster.store.get(keys.spec_deployment(NAMESPACE, NAME))
    assert found is not None
    assert records_pb2.DeploymentRecord.FromString(found.value).spec.replicas == 1
    status = (await scene.cluster.status(NAME)).autoscale
    assert (status.desired_replicas, status.reason) == (2, "ScaledIn")


async def test_missing_samples_hold_and_are_told(scene: Scene) -> None:
    await scene.declare(policy(), replicas=2)
    await scene.pass_time(5)
    scene.silent.add(min(await scene.cluster.assignments()))
    await scene.pass_time(80)
    assert await scene.desired() == 2
    (told,) = scene.cluster.events.of("AutoscaleDataMissing")
    assert told["warning"]
    assert "1 of 2 replicas" in str(told["message"])


async def test_it_sleeps_and_the_first_request_wakes_it(scene: Scene) -> None:
    await scene.declare(policy(min_replicas=0))
    await scene.pass_time(40)
    assert (await scene.desired(), await scene.serving()) == (0, 0)
    assert (await scene.cluster.status(NAME)).phase == types_pb2.DEPLOYMENT_PHASE_STOPPED
    await scene.pass_time(5)
    scene.demand = records_pb2.DeploymentDemand(parked_requests=1)
    await scene.report_demand()

    async def woken() -> bool:
        return await scene.desired() == 1

    # The router's word alone wakes it: no time has to pass.
    await scene.cluster.drive(woken, agents=False)
    await scene.cluster.idle()
    (step,) = scene.cluster.events.of("WokenUp")
    assert step["message"] == "0 -> 1: a request waits for it"


async def test_without_a_router_it_does_not_sleep(scene: Scene) -> None:
    scene.demand = None
    await scene.declare(policy(min_replicas=0))
    await scene.pass_time(80)
    assert await scene.serving() == 1


async def test_a_new_leader_goes_on_where_the_last_one_was(scene: Scene) -> None:
    await scene.declare(policy())
    scene.waiting = 50
    await scene.pass_time(45)
    assert await scene.desired() == 3
    scene.waiting = 0
    await scene.pass_time(20)
    await scene.cluster.__aexit__()
    async with ReconciledCluster(scene.cluster.store, scene.clock, member_id="member-b") as second:
        scene.cluster = second
        await scene.pass_time(15)
        # What the first leader saw last may have been written half a minute early: that much is added.
        assert await scene.desired() == 3
        await scene.pass_time(30)
        assert await scene.desired() == 2


async def test_users_set_bounds_and_the_first_number_and_take_the_policy_away(scene: Scene) -> None:
    await scene.declare(policy())
    await scene.pass_time(3)
    await scene.change(replicas=3)
    await scene.pass_time(4)
    assert await scene.serving() == 3
    (told,) = scene.cluster.events.of("FirstNumberChanged")
    assert "1 -> 3" in str(told["message"])
    await scene.change(autoscale=policy(most=2))
    await scene.pass_time(4)
    assert await scene.desired() == 2
    assert scene.cluster.events.of("AboveMaximum")
    await scene.change(autoscale=None, replicas=4)
    await scene.pass_time(4)
    assert await scene.serving() == 4
    concluded = await scene.cluster.concluded(NAME)
    assert concluded is not None
    assert not concluded.HasField("autoscale")
    # Zero stops it where the policy does not allow zero.
    await scene.change(autoscale=policy(), replicas=0)
    await scene.pass_time(4)
    assert await scene.serving() == 0


async def test_a_policy_that_cannot_be_kept_to_is_told_once_and_stops_nobody_else(scene: Scene) -> None:
    broken = policy()
    broken.cron_windows.add(days="*", start_time="08:00", end_time="18:00", time_zone="Nowhere/At_All")
    record = await scene.cluster.declare("odd", memory_gib=1)
    record.spec.autoscale.CopyFrom(broken)
    await scene.cluster.put(keys.spec_deployment(NAMESPACE, "odd"), record)
    await scene.declare(policy(min_replicas=2))
    await scene.pass_time(5)
    assert await scene.serving() == 2
    (told,) = scene.cluster.events.of("AutoscaleFailed")
    assert told["deployment"] == "odd"
    assert "Nowhere/At_All" in str(told["message"])


async def test_writes_are_few(scene: Scene) -> None:
    await scene.declare(policy())
    await scene.pass_time(10)
    scene.demand = records_pb2.DeploymentDemand(in_flight_requests=1)
    revisions = set()
    for _ in range(60):
        await scene.second()
        found = await scene.cluster.store.get(keys.plan_deployment(NAMESPACE, NAME))
        assert found is not None
        revisions.add(found.mod_revision)
    assert len(revisions) <= 5
