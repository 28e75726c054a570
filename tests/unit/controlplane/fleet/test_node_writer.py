"""Refreshing the records of many nodes in one transaction, and one by one where that is refused."""

import asyncio

import pytest
from millrace.core.v1 import node_pb2, stats_pb2, types_pb2
from millrace.state.v1 import records_pb2

from controlplane.fleet.nodes import NodeWriter
from controlplane.fleet.sessions import Session, SessionTable
from core.store import MemoryStore, Mirror, Put, keys
from core.tasks import cancel_and_wait
from tests.support.clock import ManualClock


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def store(clock: ManualClock) -> MemoryStore:
    return MemoryStore(clock)


async def _record(store: MemoryStore, node: str) -> records_pb2.NodeObservationRecord:
    found = await store.get(keys.actual_node(node))
    assert found is not None
    return records_pb2.NodeObservationRecord.FromString(found.value)


async def test_records_are_refreshed_together_and_a_changed_one_by_itself(
    store: MemoryStore, clock: ManualClock
) -> None:
    records = Mirror(
        store,
        keys.ACTUAL_NODES,
        records_pb2.NodeObservationRecord.FromString,
        name="nodes",
        clock=clock,
    )
    writer, table = NodeWriter(store, clock, records), SessionTable(clock)
    sessions: dict[str, Session] = {}
    for number in range(120):
        node = f"n{number}"
        sessions[node] = table.open(node, "a")
        inventory = node_pb2.NodeInventory(node=node)
        await writer.opened(sessions[node], inventory)
        assert sessions[node].opened_revision > 0
    mirroring = asyncio.create_task(records.run(), name="mirror")
    await clock.advance(1)
    before = (await store.list(keys.ROOT)).revision
    writer.note_devices("n7", [stats_pb2.DeviceStats(device_id="cpu")])
    assert await writer.refresh(list(sessions.values())) == []
    assert (await store.list(keys.ROOT)).revision == before + 2
    assert [each.device_id for each in (await _record(store, "n7")).devices] == ["cpu"]

    # Behind the mirror's back one node is called silent, and another has opened a session elsewhere.
    await cancel_and_wait(mirroring)
    silent, moved = await _record(store, "n1"), await _record(store, "n2")
    silent.state = types_pb2.NODE_STATE_SILENT
    moved.session_id = "elsewhere"
    for node, record in (("n1", silent), ("n2", moved)):
        await store.commit([Put(keys.actual_node(node), record.SerializeToString())])
    await clock.advance(1)
    assert await writer.refresh([sessions["n1"], sessions["n2"], sessions["n3"]]) == [sessions["n2"]]
    assert (await _record(store, "n1")).state == types_pb2.NODE_STATE_READY
    assert (await _record(store, "n2")).session_id == "elsewhere"
    writer.forget_devices({"n1"})
    assert writer._devices == {}
