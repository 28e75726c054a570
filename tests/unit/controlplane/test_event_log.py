"""The event log: order, leases, outages, a bounded queue."""

import asyncio
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
from millrace.core.v1 import event_pb2, types_pb2

from controlplane import events
from controlplane.events import EventLog
from core.store import keys
from core.store.memory import MemoryStore
from core.tasks import cancel_and_wait
from tests.support.clock import ManualClock


class World:
    """A log, its store and its time."""

    def __init__(self) -> None:
        self.clock = ManualClock()
        self.store = MemoryStore(self.clock)
        self.log = EventLog(self.store, self.clock)

    def emit(self, reason: str, namespace: str = "team") -> None:
        self.log.emit(namespace=namespace, reason=reason, message="why", source="test", warning=True)

    async def kept(self) -> list[event_pb2.Event]:
        page = await self.store.list(keys.EVENTS)
        return [event_pb2.Event.FromString(item.value) for item in page.items]

    async def leases(self) -> set[int]:
        return {item.lease_id for item in (await self.store.list(keys.EVENTS)).items}


@pytest_asyncio.fixture
async def world() -> AsyncIterator[World]:
    made = World()
    task = asyncio.create_task(made.log.run(), name="event-log")
    yield made
    await cancel_and_wait(task)


async def test_events_are_kept_in_order(world: World) -> None:
    for number in range(200):
        world.emit(f"R{number}")
    await world.log.drained()
    kept = await world.kept()
    assert [each.reason for each in kept] == [f"R{number}" for number in range(200)]
    assert kept[0].severity == types_pb2.EVENT_SEVERITY_WARNING
    assert len(kept[0].id) == 26
    assert len(await world.leases()) == 1


async def test_one_lease_an_hour_and_events_live_a_day(world: World) -> None:
    world.emit("first")
    await world.log.drained()
    await world.clock.advance(3600)
    world.emit("second")
    await world.log.drained()
    assert len(await world.leases()) == 2
    await world.clock.advance(23 * 3600)
    assert [each.reason for each in await world.kept()] == ["first", "second"]
    await world.clock.advance(2 * 3600)
    assert not await world.kept()


async def test_outage_delays_events_and_loses_none(world: World) -> None:
    world.store.set_available(False)
    world.emit("during")
    await world.clock.advance(30)
    world.store.set_available(True)
    assert not await world.kept()
    await world.clock.advance(10)
    await world.log.drained()
    assert [each.reason for each in await world.kept()] == ["during"]


async def test_revoked_lease_is_replaced(world: World) -> None:
    world.emit("first")
    await world.log.drained()
    (lease,) = await world.leases()
    world.store.expire_lease(lease)
    world.emit("second")
    await world.log.drained()
    assert [each.reason for each in await world.kept()] == ["second"]


async def test_full_queue_drops_the_oldest_and_counts(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "QUEUE_LENGTH_MAX", 3)
    world.store.set_available(False)
    for number in range(5):
        world.emit(f"R{number}")
    assert world.log.dropped == 2
    world.store.set_available(True)
    await world.log.drained()
    assert [each.reason for each in await world.kept()] == ["R2", "R3", "R4"]


async def test_events_without_a_namespace_belong_to_the_system(world: World) -> None:
    world.emit("node", namespace="")
    await world.log.drained()
    assert [each.namespace for each in await world.kept()] == ["millrace-system"]
