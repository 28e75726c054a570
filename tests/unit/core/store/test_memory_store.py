"""What the store in memory does beyond the contract: time, outages and bounds."""

import asyncio
from contextlib import aclosing

import pytest

from core.store import (
    Compacted,
    LeaseLost,
    MemoryStore,
    Put,
    StoreError,
    StoreUnavailable,
    WatchBatch,
)
from tests.support.clock import ManualClock


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


async def _first(store: MemoryStore, start: int) -> WatchBatch:
    async with aclosing(store.watch("/", start_revision=start)) as watch:
        async for batch in watch:
            if batch.events:
                return batch
    raise AssertionError("the watch ended")


async def test_a_watch_sees_a_lease_expire_without_any_call(clock: ManualClock) -> None:
    store = MemoryStore(clock)
    watching = asyncio.create_task(_first(store, 3), name="watching")
    await clock.advance(0.1)
    lease = await store.grant_lease(3)
    await store.commit([Put("/a", b"", lease_id=lease.lease_id)])
    await clock.advance(2.8)
    assert not watching.done()
    await clock.advance(0.3)
    assert watching.done()
    assert [event.value for event in (await watching).events] == [None]
    with pytest.raises(LeaseLost):
        await lease.keep_alive()


async def test_a_watch_gives_up_after_thirty_seconds_away(clock: ManualClock) -> None:
    store = MemoryStore(clock)
    watching = asyncio.create_task(_first(store, 1), name="watching")
    await clock.advance(1)
    store.set_available(False)
    await clock.advance(29)
    assert not watching.done()
    await clock.advance(2)
    with pytest.raises(StoreUnavailable):
        await watching


async def test_history_has_a_bound(clock: ManualClock) -> None:
    store = MemoryStore(clock, history_revisions=10)
    for number in range(100):
        await store.commit([Put("/a", str(number).encode())])
    page = await store.list("/")
    assert page.items[0].value == b"99"
    assert (await store.list("/", revision=page.revision - 9)).items[0].value == b"90"
    with pytest.raises(Compacted):
        await store.list("/", revision=page.revision - 30)
    with pytest.raises(Compacted):
        await _first(store, 2)
    assert len(store._log) <= 12
    assert len(store._versions["/a"]) <= 12


async def test_what_lies_in_the_future_is_refused(clock: ManualClock) -> None:
    store = MemoryStore(clock)
    with pytest.raises(StoreError, match="future"):
        await store.list("/", revision=100)
    with pytest.raises(StoreError, match="future"):
        await store.compact(100)
    await store.compact(1)
    with pytest.raises(Compacted):
        await store.compact(1)
