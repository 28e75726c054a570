"""What every store does, checked on the one in memory and on a real etcd."""

import asyncio
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import aclosing
from dataclasses import dataclass

import pytest
import pytest_asyncio
from millrace.state.v1 import records_pb2

from core.clock import SystemClock
from core.store import (
    MAXIMUM_OPERATIONS,
    Commit,
    Compacted,
    Compare,
    Delete,
    EtcdStore,
    Leadership,
    LeaseLost,
    MemoryStore,
    Mirror,
    Presence,
    Put,
    Store,
    StoreUnavailable,
    WatchBatch,
    keys,
)
from core.tasks import cancel_and_wait
from tests.support.etcd import EtcdProcess
from tests.support.waiting import eventually


@dataclass(frozen=True)
class Backend:
    """A store, and what a test may do to it."""

    store: Store
    compact: Callable[[int], Awaitable[None]]
    fail: Callable[[], None]
    restore: Callable[[], None]


@pytest.fixture(scope="module")
def etcd() -> Iterator[EtcdProcess]:
    with EtcdProcess() as process:
        yield process


@pytest_asyncio.fixture(params=["memory", "etcd"])
async def backend(request: pytest.FixtureRequest) -> AsyncIterator[Backend]:
    if request.param == "memory":
        memory = MemoryStore(SystemClock())
        yield Backend(
            memory,
            memory.compact,
            lambda: memory.set_available(False),
            lambda: memory.set_available(True),
        )
        await memory.close()
        return
    process: EtcdProcess = request.getfixturevalue("etcd")
    store = await EtcdStore.connect(process.settings)
    yield Backend(store, store.compact, process.kill, process.start)
    await store.close()


@pytest.fixture
def store(backend: Backend) -> Store:
    return backend.store


@pytest.fixture
def prefix() -> str:
    return f"/test/{uuid.uuid4().hex}/"


async def _put(store: Store, key: str, value: bytes = b"", lease_id: int = 0) -> int:
    commit = await store.commit([Put(key, value, lease_id=lease_id)])
    assert commit.succeeded
    return commit.revision


async def _events(
    store: Store, prefix: str, start_revision: int, count: int, timeout_seconds: float = 10
) -> list[WatchBatch]:
    """Batches with events until so many events have come."""
    batches: list[WatchBatch] = []
    async with (
        asyncio.timeout(timeout_seconds),
        aclosing(store.watch(prefix, start_revision=start_revision)) as watch,
    ):
        async for batch in watch:
            if batch.events:
                batches.append(batch)
            if sum(len(each.events) for each in batches) >= count:
                break
    return batches


class TestReadingAndWriting:
    async def test_an_absent_key_is_none(self, store: Store, prefix: str) -> None:
        assert await store.get(prefix + "nothing") is None

    async def test_revisions_tell_creation_and_last_write(self, store: Store, prefix: str) -> None:
        created = await _put(store, prefix + "a", b"1")
        written = await _put(store, prefix + "a", b"2")
        found = await store.get(prefix + "a")
        assert found is not None
        assert (found.key, found.value) == (prefix + "a", b"2")
        assert (found.create_revision, found.mod_revision) == (created, written)
        assert written > created

    async def test_a_key_made_again_has_a_new_create_revision(self, store: Store, prefix: str) -> None:
        first = await _put(store, prefix + "a")
        await store.commit([Delete(prefix + "a")])
        assert await store.get(prefix + "a") is None
        second = await _put(store, prefix + "a")
        found = await store.get(prefix + "a")
        assert found is not None
        assert found.create_revision == second > first

    async def test_a_transaction_is_one_revision(self, store: Store, prefix: str) -> None:
        await _put(store, prefix + "old")
        commit = await store.commit(
            [Put(prefix + "a", b"1"), Put(prefix + "b", b"2"), Delete(prefix + "old")]
        )
        page = await store.list(prefix)
        assert [item.mod_revision for item in page.items] == [commit.revision] * 2
        assert page.revision == commit.revision

    async def test_deleting_what_is_absent_changes_nothing(self, store: Store, prefix: str) -> None:
        before = await _put(store, prefix + "a")
        commit = await store.commit([Delete(prefix + "nothing")])
        assert commit == Commit(succeeded=True, revision=before)

    async def test_values_are_any_bytes(self, store: Store, prefix: str) -> None:
        value = bytes(range(256))
        await _put(store, prefix + "ä", value)
        found = await store.get(prefix + "ä")
        assert found is not None
        assert found.value == value


class TestGuards:
    async def test_create_only_once(self, store: Store, prefix: str) -> None:
        absent = Compare(prefix + "a", mod_revision=0)
        first = await store.commit([Put(prefix + "a", b"1")], compares=[absent])
        second = await store.commit([Put(prefix + "a", b"2")], compares=[absent])
        assert (first.succeeded, second.succeeded) == (True, False)
        assert second.revision == first.revision
        found = await store.get(prefix + "a")
        assert found is not None
        assert found.value == b"1"

    async def test_mod_revision_guards_an_update(self, store: Store, prefix: str) -> None:
        revision = await _put(store, prefix + "a", b"1")
        guard = Compare(prefix + "a", mod_revision=revision)
        assert (await store.commit([Put(prefix + "a", b"2")], compares=[guard])).succeeded
        assert not (await store.commit([Put(prefix + "a", b"3")], compares=[guard])).succeeded

    async def test_create_revision_survives_updates_but_not_deletion(self, store: Store, prefix: str) -> None:
        created = await _put(store, prefix + "leader")
        fencing = Compare(prefix + "leader", create_revision=created)
        await _put(store, prefix + "leader", b"changed")
        assert (await store.commit([Put(prefix + "a", b"")], compares=[fencing])).succeeded
        await store.commit([Delete(prefix + "leader")])
        assert not (await store.commit([Put(prefix + "a", b"")], compares=[fencing])).succeeded
        await _put(store, prefix + "leader")
        assert not (await store.commit([Put(prefix + "a", b"")], compares=[fencing])).succeeded

    async def test_one_failed_condition_of_several_stops_all(self, store: Store, prefix: str) -> None:
        revision = await _put(store, prefix + "a", b"1")
        commit = await store.commit(
            [Put(prefix + "a", b"2"), Put(prefix + "b", b"2")],
            compares=[
                Compare(prefix + "a", mod_revision=revision),
                Compare(prefix + "b", mod_revision=revision),
            ],
        )
        assert not commit.succeeded
        assert [item.value for item in (await store.list(prefix)).items] == [b"1"]

    async def test_concurrent_guarded_writers_lose_no_update(self, store: Store, prefix: str) -> None:
        await _put(store, prefix + "counter", b"0")

        async def add_one() -> None:
            while True:
                found = await store.get(prefix + "counter")
                assert found is not None
                commit = await store.commit(
                    [Put(found.key, str(int(found.value) + 1).encode())],
                    compares=[Compare(found.key, mod_revision=found.mod_revision)],
                )
                if commit.succeeded:
                    return

        await asyncio.gather(*(add_one() for _ in range(8)))
        found = await store.get(prefix + "counter")
        assert found is not None
        assert found.value == b"8"

    async def test_the_bound_of_a_transaction(self, store: Store, prefix: str) -> None:
        most = [Put(f"{prefix}{number:03}", b"") for number in range(MAXIMUM_OPERATIONS)]
        assert (await store.commit(most)).succeeded
        with pytest.raises(ValueError, match="128"):
            await store.commit([*most, Put(prefix + "more", b"")])
        assert len((await store.list(prefix)).items) == MAXIMUM_OPERATIONS

    async def test_wrong_transactions_are_refused(self, store: Store, prefix: str) -> None:
        with pytest.raises(ValueError, match="twice"):
            await store.commit([Put(prefix + "a", b""), Delete(prefix + "a")])
        with pytest.raises(ValueError, match="exactly one"):
            await store.commit([Put(prefix + "a", b"")], compares=[Compare(prefix + "a")])
        with pytest.raises(ValueError, match="at least one"):
            await store.commit([])


class TestListing:
    async def test_keys_come_in_order_and_only_of_the_prefix(self, store: Store, prefix: str) -> None:
        for name in ("b", "a/x", "a"):
            await _put(store, prefix + name)
        await _put(store, prefix.rstrip("/") + "0")
        page = await store.list(prefix)
        assert [item.key for item in page.items] == [prefix + each for each in ("a", "a/x", "b")]
        assert not page.more

    async def test_pages_of_one_revision_are_one_snapshot(self, store: Store, prefix: str) -> None:
        for number in range(5):
            await _put(store, f"{prefix}{number}", b"old")
        first = await store.list(prefix, limit=2)
        await store.commit([Put(prefix + "3", b"new"), Delete(prefix + "4"), Put(prefix + "9", b"new")])
        second = await store.list(prefix, limit=2, start_after=first.items[-1].key, revision=first.revision)
        third = await store.list(prefix, limit=2, start_after=second.items[-1].key, revision=first.revision)
        names = [item.key[-1] for page in (first, second, third) for item in page.items]
        assert names == ["0", "1", "2", "3", "4"]
        assert {item.value for item in (*second.items, *third.items)} == {b"old"}
        assert (first.more, second.more, third.more) == (True, True, False)
        assert first.revision == second.revision == third.revision

    async def test_a_limit_that_fits_leaves_no_more(self, store: Store, prefix: str) -> None:
        await store.commit([Put(prefix + "a", b""), Put(prefix + "b", b"")])
        assert not (await store.list(prefix, limit=2)).more

    async def test_keys_only_leaves_values_out(self, store: Store, prefix: str) -> None:
        revision = await _put(store, prefix + "a", b"value")
        (item,) = (await store.list(prefix, keys_only=True)).items
        assert (item.value, item.mod_revision) == (b"", revision)

    async def test_a_large_prefix_comes_whole(self, store: Store, prefix: str) -> None:
        for start in range(0, 2500, 125):
            await store.commit([Put(f"{prefix}{start + n:05}", b"v") for n in range(125)])
        page = await store.list(prefix)
        assert [item.key for item in page.items] == [f"{prefix}{n:05}" for n in range(2500)]
        page = await store.list(prefix, limit=1500)
        assert len(page.items) == 1500
        assert page.more

    async def test_an_empty_prefix_is_refused(self, store: Store) -> None:
        with pytest.raises(ValueError, match="empty"):
            await store.list("")

    async def test_a_compacted_snapshot_is_gone(self, backend: Backend, prefix: str) -> None:
        old = await _put(backend.store, prefix + "a", b"1")
        new = await _put(backend.store, prefix + "a", b"2")
        await backend.compact(new)
        with pytest.raises(Compacted):
            await backend.store.list(prefix, revision=old)
        assert len((await backend.store.list(prefix, revision=new)).items) == 1


class TestWatching:
    async def test_nothing_is_missed_between_list_and_watch(self, store: Store, prefix: str) -> None:
        await _put(store, prefix + "a")
        page = await store.list(prefix)
        revisions = [await _put(store, f"{prefix}{number}", b"v") for number in range(10)]
        batches = await _events(store, prefix, page.revision + 1, 10)
        events = [event for batch in batches for event in batch.events]
        assert [event.key[-1] for event in events] == [str(number) for number in range(10)]
        assert [event.value.mod_revision for event in events if event.value] == revisions
        assert batches[-1].revision == revisions[-1]

    async def test_a_deletion_has_no_value(self, store: Store, prefix: str) -> None:
        revision = await _put(store, prefix + "a", b"v")
        await store.commit([Delete(prefix + "a")])
        batches = await _events(store, prefix, revision, 2)
        events = [event for batch in batches for event in batch.events]
        assert [event.value is None for event in events] == [False, True]

    async def test_other_prefixes_stay_away(self, store: Store, prefix: str) -> None:
        start = await _put(store, prefix + "a/1")
        await _put(store, prefix + "b/1")
        await _put(store, prefix + "a/2")
        batches = await _events(store, prefix + "a/", start, 2)
        names = [event.key for batch in batches for event in batch.events]
        assert names == [prefix + "a/1", prefix + "a/2"]

    async def test_a_revision_is_never_split(self, store: Store, prefix: str) -> None:
        """Transactions so large that etcd has to cut its responses into fragments."""
        revisions = []
        for turn in range(5):
            commit = await store.commit(
                [Put(f"{prefix}{number:03}", bytes([turn]) * 10_000) for number in range(100)]
            )
            revisions.append(commit.revision)
        batches = await _events(store, prefix, revisions[0], 500)
        seen: list[int] = []
        for batch in batches:
            of_batch = {event.value.mod_revision for event in batch.events if event.value}
            assert not of_batch & set(seen)
            assert len(batch.events) == 100 * len(of_batch)
            seen += sorted(of_batch)
        assert seen == revisions

    async def test_changes_come_as_they_happen(self, store: Store, prefix: str) -> None:
        start = (await store.list(prefix)).revision + 1
        task = asyncio.create_task(_events(store, prefix, start, 1), name="watching")
        await asyncio.sleep(0.05)
        revision = await _put(store, prefix + "a")
        (batch,) = await task
        assert batch.revision == revision

    async def test_a_compacted_start_is_told(self, backend: Backend, prefix: str) -> None:
        old = await _put(backend.store, prefix + "a", b"1")
        await _put(backend.store, prefix + "a", b"2")
        new = await _put(backend.store, prefix + "a", b"3")
        await backend.compact(new)
        with pytest.raises(Compacted) as raised:
            await _events(backend.store, prefix, old, 3)
        assert raised.value.compact_revision == new

    async def test_a_start_below_one_is_refused(self, store: Store, prefix: str) -> None:
        with pytest.raises(ValueError, match="start_revision"):
            store.watch(prefix, start_revision=0)

    async def test_it_resumes_after_an_outage(self, backend: Backend, prefix: str) -> None:
        store = backend.store
        start = await _put(store, prefix + "before")
        task = asyncio.create_task(_events(store, prefix, start, 3), name="watching")
        await asyncio.sleep(0.05)
        backend.fail()
        await asyncio.sleep(0.1)
        backend.restore()
        await _put(store, prefix + "after-1")
        await _put(store, prefix + "after-2")
        names = [event.key.removeprefix(prefix) for batch in await task for event in batch.events]
        assert names == ["before", "after-1", "after-2"]


class TestLeases:
    async def test_keys_go_with_their_lease(self, store: Store, prefix: str) -> None:
        lease = await store.grant_lease(1)
        start = await _put(store, prefix + "a", b"v", lease.lease_id)
        await _put(store, prefix + "b", b"v", lease.lease_id)
        found = await store.get(prefix + "a")
        assert found is not None
        assert found.lease_id == lease.lease_id
        batches = await _events(store, prefix, start, 4)
        gone = [event.key for batch in batches for event in batch.events if event.value is None]
        assert sorted(gone) == [prefix + "a", prefix + "b"]
        assert await store.get(prefix + "a") is None
        with pytest.raises(LeaseLost):
            await lease.keep_alive()
        with pytest.raises(LeaseLost):
            await _put(store, prefix + "a", b"v", lease.lease_id)
        await lease.revoke()

    async def test_renewing_keeps_keys(self, store: Store, prefix: str) -> None:
        lease = await store.grant_lease(1)
        await _put(store, prefix + "a", b"v", lease.lease_id)
        async with asyncio.timeout(10):
            for _ in range(18):
                await lease.keep_alive()
                await asyncio.sleep(0.1)
        assert await store.get(prefix + "a") is not None
        await lease.revoke()

    async def test_revoking_deletes_at_once(self, store: Store, prefix: str) -> None:
        lease = await store.grant_lease(60)
        assert lease.ttl_seconds >= 60
        await _put(store, prefix + "a", b"v", lease.lease_id)
        await lease.revoke()
        assert await store.get(prefix + "a") is None
        await lease.revoke()

    async def test_a_key_written_again_leaves_its_old_lease(self, store: Store, prefix: str) -> None:
        lease = await store.grant_lease(60)
        await _put(store, prefix + "a", b"v", lease.lease_id)
        await _put(store, prefix + "a", b"w")
        await lease.revoke()
        assert await store.get(prefix + "a") is not None


class TestOutage:
    async def test_calls_are_refused_when_closed(self, store: Store, prefix: str) -> None:
        task = asyncio.create_task(_events(store, prefix, 1_000_000, 1), name="watching")
        await asyncio.sleep(0.05)
        await store.close()
        with pytest.raises(StoreUnavailable):
            await task
        with pytest.raises(StoreUnavailable):
            await store.get(prefix + "a")

    async def test_mirror_presence_and_leadership_come_through(self, backend: Backend, prefix: str) -> None:
        clock = SystemClock()
        mirror = Mirror(backend.store, prefix, bytes.decode, name="test", clock=clock)
        presence = Presence(backend.store, 5, clock)
        leadership = Leadership(backend.store, f"member-{prefix}", records_pb2.LeaderRecord(), clock=clock)
        tasks = [
            asyncio.create_task(mirror.run(), name="mirror"),
            asyncio.create_task(presence.run(), name="presence"),
        ]
        try:
            await mirror.wait_synced(5)
            await presence.put(prefix + "me", b"here")
            fencing = await asyncio.wait_for(leadership.acquire(), 10)
            await eventually(lambda: mirror.items == {prefix + "me": "here"})
            backend.fail()
            await asyncio.sleep(0.1)
            backend.restore()
            await _put(backend.store, prefix + "other", b"after")
            await eventually(lambda: mirror.get(prefix + "other") == "after")
            assert mirror.get(prefix + "me") == "here"
            assert leadership.held
            commit = await backend.store.commit([Put(prefix + "led", b"")], compares=[leadership.compare()])
            assert commit.succeeded
            found = await backend.store.get(keys.LIVE_LEADER)
            assert found is not None
            assert found.create_revision == fencing
        finally:
            await cancel_and_wait(*tasks)
            await leadership.resign()
            await presence.close()
        assert await backend.store.get(prefix + "me") is None
        assert await backend.store.get(keys.LIVE_LEADER) is None
