"""Several control planes, one store: a node that moves from one to the other, and one that lost the store."""

import asyncio
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
from millrace.core.v1 import node_pb2, replica_pb2, types_pb2
from millrace.fleet.v1 import fleet_service_pb2 as messages
from millrace.state.v1 import records_pb2

from controlplane.fleet.service import FleetService
from core.errors import Unavailable
from core.store import MemoryStore, Put, StoreUnavailable, keys
from core.tasks import cancel_and_wait
from tests.support.clock import ManualClock
from tests.support.recorded_events import RecordedEvents

HEARTBEAT_SECONDS = 2.0


class Member:
    """One control plane's fleet, called as gRPC would call it."""

    def __init__(self, store: MemoryStore, clock: ManualClock) -> None:
        self.clock = clock
        self.events = RecordedEvents()
        self.fleet = FleetService(store, clock, self.events, heartbeat_seconds=HEARTBEAT_SECONDS)
        self.task = asyncio.create_task(self.fleet.run(), name="fleet")

    async def open(self) -> str:
        request = messages.OpenSessionRequest(inventory=node_pb2.NodeInventory(node="n1"))
        return (await self.fleet._servicer.OpenSession(request, None)).session_id

    async def beat(self, session_id: str) -> None:
        await self.fleet._servicer.Heartbeat(messages.HeartbeatRequest(session_id=session_id), None)


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def store(clock: ManualClock) -> MemoryStore:
    return MemoryStore(clock)


@pytest_asyncio.fixture
async def members(store: MemoryStore, clock: ManualClock) -> AsyncIterator[tuple[Member, Member]]:
    pair = Member(store, clock), Member(store, clock)
    await clock.advance(1)
    yield pair
    await cancel_and_wait(*(each.task for each in pair))


async def test_a_node_that_moved_is_not_called_silent_by_the_one_it_left(
    members: tuple[Member, Member], clock: ManualClock
) -> None:
    left, taken = members
    await left.open()
    await clock.advance(1)
    session = await taken.open()
    for _ in range(60):
        await clock.advance(HEARTBEAT_SECONDS / 2)
        await taken.beat(session)
    assert left.events.reasons() == []
    assert taken.events.reasons() == []
    assert left.fleet._sessions.all() == ()


async def test_a_control_plane_without_the_store_sends_agents_away(
    members: tuple[Member, Member], store: MemoryStore, clock: ManualClock
) -> None:
    member = members[0]
    session = await member.open()
    store.set_available(available=False)
    for _ in range(7):
        await clock.advance(HEARTBEAT_SECONDS)
        await member.beat(session)
    await clock.advance(HEARTBEAT_SECONDS)
    with pytest.raises(Unavailable, match="has not heard from etcd for 17 s") as refused:
        await member.beat(session)
    assert refused.value.reason == "ERROR_REASON_STORE_UNAVAILABLE"


async def test_a_complete_set_never_lags_behind_the_store(
    members: tuple[Member, Member], store: MemoryStore, clock: ManualClock
) -> None:
    """A mirror whose watch has died must not have an agent stop what was assigned meanwhile."""
    member = members[0]
    session = await member.open()
    await cancel_and_wait(member.task)
    assignment = replica_pb2.ReplicaAssignment(
        namespace="ns",
        deployment="d",
        replica="r1",
        node="n1",
        desired_state=types_pb2.REPLICA_STATE_READY,
    )
    await store.commit([Put(keys.plan_replica("ns", "d", "r1"), assignment.SerializeToString())])
    stream = member.fleet._servicer.WatchAssignments(
        messages.WatchAssignmentsRequest(session_id=session), None
    )
    first = asyncio.ensure_future(anext(aiter(stream)))
    await clock.advance(11)
    with pytest.raises(StoreUnavailable, match="lags behind"):
        await first


async def test_a_session_is_kept_until_its_own_record_is_seen(
    members: tuple[Member, Member], clock: ManualClock
) -> None:
    """The record in the mirror may be that of the session before."""
    member = members[0]
    await member.open()
    newer = await member.open()
    session = member.fleet._sessions.of_node("n1")
    assert session is not None
    session.opened_revision += 1
    earlier = records_pb2.NodeObservationRecord(session_id="of-an-earlier-session")
    assert member.fleet._session_of("n1", earlier) is session
    session.opened_revision -= 1
    await clock.advance(1)
    await member.beat(newer)
    assert member.fleet._session_of("n1", earlier) is None
