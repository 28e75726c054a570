"""Priorities, quotas and the leader's incremental books, through the real loop."""

from collections.abc import AsyncIterator, Sequence

import pytest
import pytest_asyncio
from millrace.core.v1 import deployment_pb2, policy_pb2, types_pb2
from millrace.state.v1 import records_pb2

from core.store import Commit, Compare, Operation, keys
from core.store.memory import MemoryStore
from tests.support.clock import ManualClock
from tests.support.reconciled_cluster import NAMESPACE, ReconciledCluster

DRAINING = types_pb2.REPLICA_STATE_DRAINING


@pytest_asyncio.fixture
async def cluster() -> AsyncIterator[ReconciledCluster]:
    clock = ManualClock()
    store = MemoryStore(clock)
    async with ReconciledCluster(store, clock) as cluster:
        yield cluster
    await store.close()


async def ready(cluster: ReconciledCluster, name: str) -> bool:
    status = await cluster.status(name)
    return status.phase == types_pb2.DEPLOYMENT_PHASE_READY and not status.reconciling


def scheduled(status: deployment_pb2.DeploymentStatus) -> deployment_pb2.Condition:
    (condition,) = [each for each in status.conditions if each.type == "Scheduled"]
    return condition


async def test_a_less_important_replica_makes_room_and_comes_back_later(cluster: ReconciledCluster) -> None:
    await cluster.add_node("node-1", memory_gib=16)
    await cluster.declare("patient", memory_gib=12, priority=2)
    await cluster.drive(lambda: ready(cluster, "patient"))
    await cluster.declare("bystander", memory_gib=10, priority=2)
    await cluster.idle()

    await cluster.declare("urgent", memory_gib=10, priority=8)

    async def asked() -> bool:
        return any(each.preempted_by for each in (await cluster.assignments()).values())

    await cluster.drive(asked, agents=False)
    await cluster.idle()
    (victim,) = (await cluster.assignments()).values()
    assert (victim.deployment, victim.desired_state) == ("patient", DRAINING)
    assert victim.preempted_by == f"{NAMESPACE}/urgent"
    assert victim.HasField("drain_deadline_time")
    kept = await cluster.concluded("urgent")
    assert kept is not None
    (reservation,) = kept.reservations
    assert (reservation.node, list(reservation.victims)) == ("node-1", [victim.replica])
    assert scheduled(await cluster.status("urgent")).reason == "WaitingForRoom"
    lost = scheduled(await cluster.status("patient"))
    assert lost.reason == "Preempted"
    assert f"{NAMESPACE}/urgent (priority 8 over 2)" in lost.message

    await cluster.drive(lambda: ready(cluster, "urgent"))
    await cluster.idle()
    (placed,) = (await cluster.assignments()).values()
    assert placed.deployment == "urgent"
    after = await cluster.concluded("urgent")
    assert after is not None
    assert not after.reservations
    assert any(each["reason"] == "Preempted" for each in cluster.events.emitted)

    await cluster.add_node("node-2", memory_gib=32)
    await cluster.drive(lambda: ready(cluster, "patient"))
    concluded = await cluster.concluded("patient")
    assert concluded is not None
    assert not concluded.HasField("preemption")


async def test_a_refused_pre_emption_starts_no_replacement(
    cluster: ReconciledCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever writes a record just before the loop has the pre-emption wait, with all that rests on it."""
    await cluster.add_node("node-1", memory_gib=16)
    await cluster.declare("patient", memory_gib=12, priority=2)
    await cluster.drive(lambda: ready(cluster, "patient"))
    (stays,) = await cluster.assignments()
    await cluster.add_node("node-2", memory_gib=13)
    commit, held = cluster.store.commit, list[list[str]]()

    async def conflicting(operations: Sequence[Operation], *, compares: Sequence[Compare] = ()) -> Commit:
        if keys.plan_replica(NAMESPACE, "patient", stays) in {each.key for each in operations}:
            held.append(list(await cluster.assignments()))
            if len(held) < 3:
                compares = [*compares, Compare(keys.LIVE_LEADER, mod_revision=0)]
        return await commit(operations, compares=compares)

    monkeypatch.setattr(cluster.store, "commit", conflicting)
    await cluster.declare("urgent", memory_gib=14, priority=8)

    async def serve() -> bool:
        # A refused round is tried again after a while.
        assert isinstance(cluster.clock, ManualClock)
        await cluster.clock.advance(0.05)
        return await ready(cluster, "urgent") and await ready(cluster, "patient")

    await cluster.drive(serve)
    assert held[:3] == [[stays]] * 3
    nodes = {each.deployment: each.node for each in (await cluster.assignments()).values()}
    assert nodes == {"urgent": "node-1", "patient": "node-2"}


async def test_a_quota_holds_back_what_would_fit(cluster: ReconciledCluster) -> None:
    quota = policy_pb2.NamespaceSpec(quota=policy_pb2.Quota(replicas=1))
    record = records_pb2.NamespaceRecord(namespace=NAMESPACE, spec=quota)
    await cluster.put(keys.spec_namespace(NAMESPACE), record)
    await cluster.add_node("node-1", memory_gib=64)
    await cluster.declare("first")
    await cluster.drive(lambda: ready(cluster, "first"))
    await cluster.declare("second")
    await cluster.idle()
    refused = await cluster.status("second")
    assert refused.phase == types_pb2.DEPLOYMENT_PHASE_UNSCHEDULABLE
    assert scheduled(refused).reason == "QuotaExceeded"
    assert f"quota of {NAMESPACE}: 1 of 1 replicas" in scheduled(refused).message

    record.spec.quota.replicas = 2
    await cluster.put(keys.spec_namespace(NAMESPACE), record)
    await cluster.drive(lambda: ready(cluster, "second"))


async def test_a_taint_that_drives_out_moves_what_runs(cluster: ReconciledCluster) -> None:
    await cluster.add_node("node-1")
    await cluster.declare("model")
    await cluster.drive(lambda: ready(cluster, "model"))
    await cluster.add_node("node-2")
    taint = policy_pb2.Taint(key="maintenance", effect=types_pb2.TAINT_EFFECT_NO_EXECUTE)
    tainted = records_pb2.NodeRecord(node="node-1")
    tainted.spec.taints.append(taint)
    await cluster.put(keys.spec_node("node-1"), tainted)

    async def moved() -> bool:
        return [each.node for each in (await cluster.assignments()).values()] == ["node-2"]

    await cluster.drive(moved)
    await cluster.drive(lambda: ready(cluster, "model"))
