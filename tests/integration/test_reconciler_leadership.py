"""Who may write: two reconcilers, one store; and the same loop on a real etcd."""

import asyncio
from collections.abc import AsyncIterator, Iterator

import pytest
import pytest_asyncio
from millrace.core.v1 import types_pb2
from millrace.state.v1 import records_pb2

from controlplane.reconciler import Reconciler
from core.clock import SystemClock
from core.store import Compare, Store, keys
from core.store.election import Leadership
from core.store.etcd import EtcdStore
from core.store.memory import MemoryStore
from core.tasks import cancel_and_wait
from tests.support.etcd import EtcdProcess
from tests.support.reconciled_cluster import ReconciledCluster
from tests.support.recorded_events import RecordedEvents
from tests.support.waiting import eventually


@pytest.fixture(scope="module")
def etcd() -> Iterator[EtcdProcess]:
    with EtcdProcess() as process:
        yield process


@pytest_asyncio.fixture
async def etcd_store(etcd: EtcdProcess) -> AsyncIterator[Store]:
    store = await EtcdStore.connect(etcd.settings)
    yield store
    await store.close()


class DeafLeader:
    """A leader that was replaced and has not noticed: it keeps its token and believes in it."""

    def __init__(self, leadership: Leadership) -> None:
        self.lost = asyncio.Event()
        self.tried = 0
        self._leadership = leadership
        self._led = False

    async def acquire(self) -> int:
        assert not self._led
        self._led = True
        return await self._leadership.acquire()

    async def resign(self) -> None:
        await self._leadership.resign()

    def compare(self) -> Compare:
        self.tried += 1
        return self._leadership.compare()


async def test_a_leader_that_was_replaced_cannot_write() -> None:
    clock = SystemClock()
    store = MemoryStore(clock)
    old_lead = Leadership(store, "old", records_pb2.LeaderRecord(), clock=clock, ttl_seconds=5)
    deaf = DeafLeader(old_lead)
    events = RecordedEvents()
    old = asyncio.create_task(Reconciler(store, clock, deaf, events).run(), name="old-reconciler")
    try:
        await eventually(lambda: old_lead.held)
        found = await store.get(keys.LIVE_LEADER)
        assert found is not None
        store.expire_lease(found.lease_id)
        cluster = ReconciledCluster(store, clock, member_id="new")
        await cluster.add_node("node-1", memory_gib=64)
        await cluster.declare("qwen", replicas=3)
        await eventually(lambda: deaf.tried > 2)
        assert not await cluster.assignments()
        async with cluster:

            async def placed() -> bool:
                return len(await cluster.assignments()) == 3

            await cluster.drive(placed, agents=False)
            await cluster.idle()
            leader = await store.get(keys.LIVE_LEADER)
            assert leader is not None
            tokens = {each.fencing_token for each in (await cluster.assignments()).values()}
            assert tokens == {leader.create_revision}
            assert not events.emitted
    finally:
        await cancel_and_wait(old)
        await store.close()


async def test_the_next_leader_takes_over_at_once() -> None:
    clock = SystemClock()
    store = MemoryStore(clock)
    async with ReconciledCluster(store, clock, member_id="second") as second:
        await eventually(lambda: second.reconciler.leading)
        async with ReconciledCluster(store, clock, member_id="first") as first:
            await second.add_node("node-1")
            await second.declare("qwen")
            await second.drive(second.assignments, agents=False)
            assert not first.reconciler.leading
            before = await second.assignments()
            await second.__aexit__()
            await eventually(lambda: first.reconciler.leading)
            await first.change("qwen", replicas=2)

            async def placed() -> bool:
                return len(await first.assignments()) == 2

            await first.drive(placed, agents=False)
            assert set(before) < set(await first.assignments())
    await store.close()


@pytest.mark.integration
async def test_on_a_real_etcd_a_model_serves_and_is_healed(etcd_store: Store) -> None:
    async with ReconciledCluster(etcd_store, SystemClock()) as cluster:
        await cluster.add_node("node-1")
        await cluster.add_node("node-2")
        await cluster.declare("qwen", replicas=2)

        async def serving() -> bool:
            status = await cluster.status("qwen")
            return status.phase == types_pb2.DEPLOYMENT_PHASE_READY and not status.reconciling

        await cluster.drive(serving)
        before = await cluster.assignments()
        victim = min(before)
        await cluster.fail(before[victim])

        async def replaced() -> bool:
            now = await cluster.assignments()
            return victim not in now and len(now) == 2

        await cluster.drive(replaced, agents=False)
        await cluster.drive(serving)
        endpoints = await cluster.endpoints()
        assert victim not in endpoints
        assert {each.state for each in endpoints.values()} == {types_pb2.ENDPOINT_STATE_READY}
        await cluster.change("qwen", relaunch=True)
        await cluster.drive(serving)
        assert not set(before) & set(await cluster.assignments())
