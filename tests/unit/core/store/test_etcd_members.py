"""Several members: dead ones, hung ones, a leader that dies; and silence on a watch."""

import asyncio
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import aclosing, asynccontextmanager

import pytest

from core.store import EtcdSettings, EtcdStore, Put, StoreUnavailable, WatchBatch, etcd_watch
from core.tasks import cancel_and_wait
from tests.support.etcd import EtcdProcess, etcd_cluster
from tests.support.ports import free_ports
from tests.support.waiting import eventually


@pytest.fixture(scope="module")
def cluster() -> Iterator[tuple[EtcdProcess, ...]]:
    with etcd_cluster(3) as members:
        yield members


@pytest.fixture(scope="module")
def etcd() -> Iterator[EtcdProcess]:
    with EtcdProcess(extra_arguments=["--experimental-watch-progress-notify-interval=500ms"]) as process:
        yield process


@asynccontextmanager
async def _store(
    endpoints: Sequence[str], *, timeout_seconds: float = 5, first: int = 0
) -> AsyncIterator[EtcdStore]:
    """A store whose first choice is the member at `first`."""
    store = EtcdStore(EtcdSettings(endpoints=tuple(endpoints), request_timeout_seconds=timeout_seconds))
    store._channels._current = first
    try:
        yield store
    finally:
        await store.close()


def _dead_endpoint() -> str:
    return f"127.0.0.1:{free_ports(1)[0]}"


async def test_a_dead_member_is_passed_over(etcd: EtcdProcess) -> None:
    async with _store([_dead_endpoint(), etcd.endpoint, _dead_endpoint()]) as store:
        started = time.monotonic()
        assert (await store.commit([Put("/members/a", b"1")])).succeeded
        assert await store.get("/members/a") is not None
        assert time.monotonic() - started < 2


async def test_a_watch_passes_over_a_dead_member(etcd: EtcdProcess) -> None:
    async with _store([_dead_endpoint(), etcd.endpoint]) as store:
        batches = await _collect(store, "/members/watched", 1)
        assert batches


async def test_no_member_at_all_is_told_within_the_bound() -> None:
    async with _store([_dead_endpoint(), _dead_endpoint()], timeout_seconds=0.5) as store:
        started = time.monotonic()
        with pytest.raises(StoreUnavailable, match="no etcd member could be reached"):
            await store.get("/members/a")
        assert time.monotonic() - started < 1.5
    with pytest.raises(StoreUnavailable):
        await EtcdStore.connect(EtcdSettings(endpoints=(_dead_endpoint(),), request_timeout_seconds=0.2))


async def test_reads_leave_a_hung_member_and_writes_are_not_repeated(
    cluster: tuple[EtcdProcess, ...],
) -> None:
    endpoints = [each.endpoint for each in cluster]
    async with _store(endpoints, timeout_seconds=1) as store:
        await store.commit([Put("/members/hung", b"1")])
        cluster[0].pause()
        try:
            store._channels._current = 0
            assert await store.get("/members/hung") is not None
            store._channels._current = 0
            with pytest.raises(StoreUnavailable):
                await store.commit([Put("/members/hung", b"2")])
            # The next write starts at another member.
            assert (await store.commit([Put("/members/hung", b"3")])).succeeded
        finally:
            cluster[0].resume()


async def test_each_member_may_die(cluster: tuple[EtcdProcess, ...]) -> None:
    """One of the three leads: its death takes an election, and no watch misses anything."""
    endpoints = [each.endpoint for each in cluster]
    async with _store(endpoints, timeout_seconds=1) as store:
        start = (await store.list("/members/")).revision + 1
        seen: list[str] = []

        async def follow() -> None:
            async with aclosing(store.watch("/members/dying/", start_revision=start)) as watch:
                async for batch in watch:
                    seen.extend(event.key for event in batch.events)

        task = asyncio.create_task(follow(), name="following")
        written: list[str] = []
        for number, member in enumerate(cluster):
            member.kill()
            key = f"/members/dying/{number}"

            async def write(key: str = key) -> bool:
                try:
                    return (await store.commit([Put(key, b"")])).succeeded
                except StoreUnavailable:
                    return False

            await eventually(write, timeout_seconds=10)
            written.append(key)
            member.start()
        await eventually(lambda: list(dict.fromkeys(seen)) == written, timeout_seconds=10)
        await cancel_and_wait(task)


async def test_progress_never_overtakes_changes(etcd: EtcdProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(etcd_watch, "_PROGRESS_SECONDS", 0.001)
    async with _store([etcd.endpoint]) as store:
        start = (await store.list("/members/")).revision + 1
        task = asyncio.create_task(_collect(store, "/members/fast/", start, until=400), name="collecting")
        for number in range(400):
            await store.commit([Put(f"/members/fast/{number}", b"x" * 1000)])
        promised = 0
        progress = 0
        for batch in await task:
            progress += not batch.events
            for event in batch.events:
                assert event.value is not None
                assert event.value.mod_revision > promised
            promised = max(promised, batch.revision)
        assert progress > 10


async def test_idle_progress_tells_of_writes_elsewhere(etcd: EtcdProcess) -> None:
    async with _store([etcd.endpoint]) as store:
        start = (await store.list("/members/")).revision + 1
        commit = await store.commit([Put("/elsewhere", b"")])
        async with (
            asyncio.timeout(10),
            aclosing(store.watch("/members/idle/", start_revision=start)) as watch,
        ):
            async for batch in watch:
                if batch.revision >= commit.revision:
                    break
        assert batch.events == ()


async def test_a_silent_member_is_given_up_and_the_watch_resumes(
    etcd: EtcdProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(etcd_watch, "_PROGRESS_SECONDS", 0.05)
    monkeypatch.setattr(etcd_watch, "_SILENCE_SECONDS", 0.2)
    async with _store([etcd.endpoint]) as store:
        start = (await store.list("/members/")).revision + 1
        task = asyncio.create_task(_collect(store, "/members/silent/", start, until=1), name="collecting")
        await asyncio.sleep(0.1)
        etcd.pause()
        await asyncio.sleep(0.19)
        await asyncio.sleep(0.19)
        etcd.resume()
        await store.commit([Put("/members/silent/a", b"")])
        assert (await task)[-1].events[0].key == "/members/silent/a"


async def test_a_long_silence_is_told(etcd: EtcdProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(etcd_watch, "_SILENCE_SECONDS", 0.1)
    monkeypatch.setattr(etcd_watch, "_CONNECT_SECONDS", 0.1)
    monkeypatch.setattr(etcd_watch, "_GIVE_UP_SECONDS", 0.4)
    async with _store([etcd.endpoint]) as store:
        start = (await store.list("/members/")).revision + 1
        etcd.pause()
        try:
            with pytest.raises(StoreUnavailable, match="nothing was heard"):
                await _collect(store, "/members/", start, until=1)
        finally:
            etcd.resume()


async def _collect(store: EtcdStore, prefix: str, start: int, *, until: int = 0) -> list[WatchBatch]:
    """Batches until so many events have come, or the first batch."""
    batches: list[WatchBatch] = []
    async with (
        asyncio.timeout(15),
        aclosing(store.watch(prefix, start_revision=start)) as watch,
    ):
        async for batch in watch:
            batches.append(batch)
            if until and sum(len(each.events) for each in batches) >= until:
                break
            if not until:
                break
    return batches
