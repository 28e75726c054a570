"""The plan by machine."""

import asyncio

from millrace.core.v1 import replica_pb2

from controlplane.fleet.assignments import AssignmentIndex
from core.store import Delete, MemoryStore, Mirror, Put, keys
from core.tasks import cancel_and_wait
from tests.support.clock import ManualClock


def _put(replica: str, node: str) -> Put:
    assignment = replica_pb2.ReplicaAssignment(namespace="ns", deployment="d", replica=replica, node=node)
    return Put(keys.plan_replica("ns", "d", replica), assignment.SerializeToString())


async def test_each_change_concerns_the_nodes_that_it_touches() -> None:
    clock = ManualClock()
    store = MemoryStore(clock)
    plans = Mirror(
        store, keys.PLAN_REPLICAS, replica_pb2.ReplicaAssignment.FromString, name="plans", clock=clock
    )
    index = AssignmentIndex(plans)
    concerned: list[set[str]] = []
    plans.subscribe(lambda changed: concerned.append(index.update(changed)))
    mirroring = asyncio.create_task(plans.run(), name="mirror")

    async def write(*operations: Put | Delete) -> set[str]:
        concerned.clear()
        await store.commit(operations)
        await clock.advance(0.1)
        return set().union(*concerned)

    def assigned(node: str) -> list[str]:
        return sorted(assignment.replica for assignment, _ in index.of_node(node).values())

    await clock.advance(1)
    assert await write(_put("a", "n1"), _put("b", "n1"), _put("c", "n2")) == {"n1", "n2"}
    assert (assigned("n1"), assigned("n2"), assigned("n3")) == (["a", "b"], ["c"], [])
    before = index.of_node("n1")
    # What was given out does not change under its reader.
    assert await write(Delete(keys.plan_replica("ns", "d", "a"))) == {"n1"}
    assert len(before) == 2
    assert assigned("n1") == ["b"]
    assert await write(_put("b", "n2")) == {"n1", "n2"}
    assert (assigned("n1"), assigned("n2")) == ([], ["b", "c"])
    assert "n1" not in index._by_node
    await cancel_and_wait(mirroring)
    await store.close()
