import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from core.store import MAXIMUM_OPERATIONS, Delete, KeyValue, MemoryStore, Presence, Put
from core.store.types import StoreUnavailable
from core.tasks import cancel_and_wait
from tests.support.clock import ManualClock
from tests.support.waiting import eventually

KEY = "/live/me"
TTL_SECONDS = 9


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def store(clock: ManualClock) -> MemoryStore:
    return MemoryStore(clock)


@pytest.fixture
def presence(store: MemoryStore, clock: ManualClock) -> Presence:
    return Presence(store, TTL_SECONDS, clock)


@asynccontextmanager
async def _running(presence: Presence) -> AsyncIterator[None]:
    task = asyncio.create_task(presence.run(), name="presence")
    try:
        yield
        assert not task.done()
    finally:
        await cancel_and_wait(task)


async def _found(store: MemoryStore, key: str = KEY) -> KeyValue:
    found = await store.get(key)
    assert found is not None
    return found


async def test_keys_outlive_the_ttl_only_while_it_runs(
    store: MemoryStore, clock: ManualClock, presence: Presence
) -> None:
    async with _running(presence):
        await presence.put(KEY, b"here")
        for _ in range(10):
            await clock.advance(TTL_SECONDS / 2)
        assert (await _found(store)).value == b"here"
        assert presence.registered
    await clock.advance(TTL_SECONDS + 1)
    assert await store.get(KEY) is None


async def test_a_lost_lease_registers_every_key_again(
    store: MemoryStore, clock: ManualClock, presence: Presence
) -> None:
    async with _running(presence):
        await presence.put_many({f"{KEY}/{number:04}": b"v" for number in range(300)})
        await presence.delete(f"{KEY}/0000")
        first = (await _found(store, f"{KEY}/0001")).lease_id
        store.expire_lease(first)
        assert (await store.list(KEY)).items == ()
        await clock.advance(TTL_SECONDS / 3 + 1)
        items = (await store.list(KEY)).items
        assert len(items) == 299 > MAXIMUM_OPERATIONS
        assert {item.lease_id for item in items} != {first}


async def test_a_put_notices_a_lost_lease_by_itself(
    store: MemoryStore, clock: ManualClock, presence: Presence
) -> None:
    await presence.put(KEY, b"1")
    await presence.put("/live/other", b"1")
    store.expire_lease((await _found(store)).lease_id)
    await presence.put(KEY, b"2")
    assert (await _found(store)).value == b"2"
    assert (await _found(store, "/live/other")).value == b"1"


async def test_an_outage_longer_than_the_ttl_is_survived(
    store: MemoryStore, clock: ManualClock, presence: Presence
) -> None:
    async with _running(presence):
        await presence.put(KEY, b"1")
        await presence.put("/live/old", b"1")
        store.set_available(False)
        await clock.advance(60)
        # Not written, said so, and remembered all the same.
        with pytest.raises(StoreUnavailable):
            await presence.put(KEY, b"2")
        with pytest.raises(StoreUnavailable):
            await presence.delete("/live/old")
        assert not presence.registered
        store.set_available(True)
        await clock.advance(3)
        await eventually(lambda: presence.registered)
        assert (await _found(store)).value == b"2"
        assert await store.get("/live/old") is None


async def test_an_outage_shorter_than_the_ttl_keeps_the_lease(
    store: MemoryStore, clock: ManualClock, presence: Presence
) -> None:
    async with _running(presence):
        await presence.put(KEY, b"1")
        before = await _found(store)
        store.set_available(False)
        await clock.advance(4)
        store.set_available(True)
        await clock.advance(20)
        assert await _found(store) == before


async def test_a_key_that_somebody_else_deleted_by_hand_comes_back_with_the_next_put(
    store: MemoryStore, presence: Presence
) -> None:
    await presence.put(KEY, b"1")
    await store.commit([Delete(KEY)])
    await presence.put(KEY, b"1")
    assert (await _found(store)).value == b"1"


async def test_closing_revokes(store: MemoryStore, presence: Presence) -> None:
    await store.commit([Put("/live/not-ours", b"")])
    await presence.put(KEY, b"1")
    await presence.close()
    assert [item.key for item in (await store.list("/live/")).items] == ["/live/not-ours"]
    with pytest.raises(StoreUnavailable):
        await presence.put(KEY, b"2")


async def test_closing_while_the_store_is_away_leaves_the_keys_to_expire(
    store: MemoryStore, clock: ManualClock, presence: Presence
) -> None:
    await presence.put(KEY, b"1")
    store.set_available(False)
    await presence.close()
    store.set_available(True)
    await clock.advance(TTL_SECONDS + 1)
    assert await store.get(KEY) is None
