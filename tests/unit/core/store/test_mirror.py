import asyncio
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from core.clock import Clock
from core.store import Delete, MemoryStore, Mirror, Page, Put, StoreUnavailable
from core.tasks import cancel_and_wait
from tests.support.clock import ManualClock
from tests.support.waiting import eventually

PREFIX = "/things/"


def _number(value: bytes) -> int:
    return int(value)


@asynccontextmanager
async def _running(mirror: Mirror[int]) -> AsyncIterator[None]:
    task = asyncio.create_task(mirror.run(), name="mirror")
    try:
        await eventually(lambda: mirror.synced)
        yield
        assert not task.done()
    finally:
        await cancel_and_wait(task)


def _mirror(store: MemoryStore, clock: Clock) -> Mirror[int]:
    return Mirror(store, PREFIX, _number, name="things", clock=clock)


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def store(clock: ManualClock) -> MemoryStore:
    return MemoryStore(clock)


async def test_it_holds_what_was_there_and_what_comes(store: MemoryStore, clock: ManualClock) -> None:
    await store.commit([Put(PREFIX + "a", b"1"), Put("/other", b"9")])
    mirror = _mirror(store, clock)
    async with _running(mirror):
        assert mirror.items == {PREFIX + "a": 1}
        commit = await store.commit([Put(PREFIX + "b", b"2"), Delete(PREFIX + "a")])
        await mirror.wait_for_revision(commit.revision, 5)
        assert mirror.items == {PREFIX + "b": 2}
        assert mirror.get(PREFIX + "b") == 2
        assert mirror.get(PREFIX + "a") is None
        assert mirror.revision_of(PREFIX + "b") == commit.revision
        assert mirror.revision_of(PREFIX + "a") == 0


async def test_a_reader_keeps_its_snapshot(store: MemoryStore, clock: ManualClock) -> None:
    await store.commit([Put(PREFIX + "a", b"1")])
    mirror = _mirror(store, clock)
    async with _running(mirror):
        before = mirror.items
        assert mirror.items is before
        commit = await store.commit([Put(PREFIX + "b", b"2")])
        await mirror.wait_for_revision(commit.revision, 5)
        assert before == {PREFIX + "a": 1}
        assert mirror.items == {PREFIX + "a": 1, PREFIX + "b": 2}


async def test_compaction_during_an_outage_lists_again_and_finds_deletions(
    store: MemoryStore, clock: ManualClock
) -> None:
    await store.commit([Put(PREFIX + each, b"1") for each in ("stays", "goes", "changes")])
    mirror = _mirror(store, clock)
    changes: list[frozenset[str]] = []
    async with _running(mirror):
        mirror.subscribe(changes.append)
        store.set_available(False)
        await clock.advance(31)  # beyond the watch's own patience
        store.set_available(True)
        await store.commit([Delete(PREFIX + "goes"), Put(PREFIX + "changes", b"2")])
        commit = await store.commit([Put(PREFIX + "comes", b"3")])
        await store.compact(commit.revision)
        await eventually(lambda: _advanced_to(mirror, clock, commit.revision))
        assert mirror.items == {
            PREFIX + "stays": 1,
            PREFIX + "changes": 2,
            PREFIX + "comes": 3,
        }
        assert changes == [frozenset({PREFIX + "goes", PREFIX + "changes", PREFIX + "comes"})]


async def test_an_outage_keeps_the_content_while_the_age_grows(
    store: MemoryStore, clock: ManualClock
) -> None:
    await store.commit([Put(PREFIX + "a", b"1")])
    mirror = _mirror(store, clock)
    assert mirror.age_seconds() == math.inf
    async with _running(mirror):
        changes: list[frozenset[str]] = []
        mirror.subscribe(changes.append)
        store.set_available(False)
        for _ in range(12):
            await clock.advance(10)
        assert mirror.items == {PREFIX + "a": 1}
        assert mirror.age_seconds() >= 119
        store.set_available(True)
        commit = await store.commit([Put(PREFIX + "b", b"2")])
        await eventually(lambda: _advanced_to(mirror, clock, commit.revision))
        assert mirror.age_seconds() <= 5
        # Resumed, not listed again: only what is new was announced.
        assert changes == [frozenset({PREFIX + "b"})]


async def test_idle_progress_keeps_it_young(store: MemoryStore, clock: ManualClock) -> None:
    mirror = _mirror(store, clock)
    async with _running(mirror):
        for _ in range(10):
            await clock.advance(5)
        assert mirror.age_seconds() <= 10
        commit = await store.commit([Put("/other", b"")])
        await eventually(lambda: _advanced_to(mirror, clock, commit.revision))


async def test_it_starts_while_the_store_is_away(store: MemoryStore, clock: ManualClock) -> None:
    store.set_available(False)
    await store_is_away(store)
    mirror = _mirror(store, clock)
    task = asyncio.create_task(mirror.run(), name="mirror")
    waiting = asyncio.create_task(mirror.wait_synced(5), name="waiting")
    await clock.advance(6)
    with pytest.raises(StoreUnavailable, match=r"things could not be read within 5 s.*away"):
        await waiting
    store.set_available(True)
    await clock.advance(3)
    await mirror.wait_synced(0)
    await cancel_and_wait(task)


async def store_is_away(store: MemoryStore) -> None:
    with pytest.raises(StoreUnavailable):
        await store.get("/any")


async def test_a_value_that_cannot_be_decoded_is_left_out(store: MemoryStore, clock: ManualClock) -> None:
    await store.commit([Put(PREFIX + "a", b"1"), Put(PREFIX + "bad", b"?")])
    mirror = _mirror(store, clock)
    async with _running(mirror):
        assert mirror.items == {PREFIX + "a": 1}
        assert mirror.undecodable == {PREFIX + "bad"}
        # Its revision is known, so that its owner can write over it.
        assert mirror.revision_of(PREFIX + "bad") > 0
        commit = await store.commit([Put(PREFIX + "bad", b"2"), Put(PREFIX + "a", b"??")])
        await mirror.wait_for_revision(commit.revision, 5)
        assert mirror.items == {PREFIX + "bad": 2}
        assert mirror.undecodable == {PREFIX + "a"}
        commit = await store.commit([Delete(PREFIX + "a")])
        await mirror.wait_for_revision(commit.revision, 5)
        assert mirror.undecodable == frozenset()


async def test_a_subscriber_that_raises_stops_nobody(store: MemoryStore, clock: ManualClock) -> None:
    mirror = _mirror(store, clock)
    heard: list[frozenset[str]] = []

    def trip(_keys: frozenset[str]) -> None:
        raise RuntimeError("tripped")

    async with _running(mirror):
        mirror.subscribe(trip)
        unsubscribe = mirror.subscribe(heard.append)
        commit = await store.commit([Put(PREFIX + "a", b"1")])
        await mirror.wait_for_revision(commit.revision, 5)
        assert heard == [frozenset({PREFIX + "a"})]
        assert mirror.failed_callbacks == 1
        unsubscribe()
        unsubscribe()
        commit = await store.commit([Put(PREFIX + "a", b"2")])
        await mirror.wait_for_revision(commit.revision, 5)
        assert len(heard) == 1


async def test_waiting_for_a_revision_has_a_bound(store: MemoryStore, clock: ManualClock) -> None:
    mirror = _mirror(store, clock)
    async with _running(mirror):
        waiting = asyncio.create_task(mirror.wait_for_revision(1000, 3), name="waiting")
        await clock.advance(4)
        with pytest.raises(StoreUnavailable, match="did not reach 1000"):
            await waiting


async def _advanced_to(mirror: Mirror[int], clock: ManualClock, revision: int) -> bool:
    await clock.advance(1)
    return mirror.revision >= revision


async def test_it_can_wait_until_nothing_that_was_written_is_missing(
    store: MemoryStore, clock: ManualClock
) -> None:
    await store.commit([Put(PREFIX + "a", b"1"), Put(PREFIX + "b", b"2")])
    mirror = _mirror(store, clock)
    async with _running(mirror):
        await store.commit([Delete(PREFIX + "a"), Put(PREFIX + "c", b"3")])
        assert PREFIX + "a" in mirror.items
        await mirror.wait_current(5)
        assert mirror.items == {PREFIX + "b": 2, PREFIX + "c": 3}
        # Others' writes move the store on and leave a quiet mirror's revision behind.
        await store.commit([Put("/other", b"9")])
        await mirror.wait_current(5)


async def test_a_mirror_that_does_not_catch_up_says_so(store: MemoryStore, clock: ManualClock) -> None:
    await store.commit([Put(PREFIX + "a", b"1")])
    mirror = _mirror(store, clock)
    async with _running(mirror):
        pass
    await store.commit([Put(PREFIX + "a", b"2")])
    waiting = asyncio.create_task(mirror.wait_current(5), name="waiting")
    await clock.advance(6)
    with pytest.raises(StoreUnavailable, match="lags behind"):
        await waiting


async def test_callers_at_one_time_share_a_listing(
    store: MemoryStore, clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    mirror = _mirror(store, clock)
    async with _running(mirror):
        listed = 0
        listing = store.list

        async def counted(*arguments: Any, **options: Any) -> Page:
            nonlocal listed
            listed += 1
            await asyncio.sleep(0)
            return await listing(*arguments, **options)

        monkeypatch.setattr(store, "list", counted)
        await asyncio.gather(*(mirror.wait_current(5) for _ in range(100)))
        # One for the first, one that began after all the others had asked.
        assert listed <= 2
