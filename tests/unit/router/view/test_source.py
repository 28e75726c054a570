"""The view follows the store, and stands while the store is away."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from millrace.core.v1 import endpoint_pb2, stats_pb2
from millrace.state.v1 import records_pb2

from core.clock import SystemClock, to_timestamp
from core.store import Delete, Put, keys
from core.store.memory import MemoryStore
from core.tasks import cancel_and_wait
from router.view.source import ViewSource
from tests.support.waiting import eventually


@asynccontextmanager
async def _source() -> AsyncIterator[tuple[MemoryStore, ViewSource]]:
    store = MemoryStore(SystemClock())
    source = ViewSource(store, SystemClock(), take_in_flight_peak=lambda _replica: 0)
    task = asyncio.create_task(source.run(), name="view")
    try:
        yield store, source
    finally:
        await cancel_and_wait(task)
        await store.close()


def _endpoint(replica: str) -> Put:
    record = endpoint_pb2.Endpoint(namespace="a", deployment="d", replica=replica)
    return Put(keys.serve_endpoint("a", "d", replica), record.SerializeToString())


async def test_follows_the_store() -> None:
    async with _source() as (store, source):
        await eventually(lambda: source.view.synced)
        await store.commit([_endpoint("r1"), _endpoint("r2")])
        await eventually(lambda: [each.replica for each in source.view.endpoints] == ["r1", "r2"])
        await store.commit([Delete(keys.serve_endpoint("a", "d", "r1"))])
        await eventually(lambda: [each.replica for each in source.view.endpoints] == ["r2"])
        before = source.view
        await store.commit(
            [
                Put(
                    keys.spec_key("h"),
                    records_pb2.ApiKeyRecord(key_hash="h", namespace="a").SerializeToString(),
                )
            ]
        )
        await eventually(lambda: "h" in source.view.api_keys)
        assert "h" not in before.api_keys


async def test_statistics_do_not_rebuild_the_view() -> None:
    async with _source() as (store, source):
        await eventually(lambda: source.view.synced)
        version = source.view.version
        stats = stats_pb2.EngineStats(
            replica="r", incarnation="i", sample_time=to_timestamp(SystemClock().now()), running_requests=1
        )
        await store.commit([Put(keys.stats("a", "d", "r"), stats.SerializeToString())])
        await eventually(lambda: source.samples.fresh("r", "i") is not None)
        await store.commit([Delete(keys.stats("a", "d", "r"))])
        await eventually(lambda: source.samples.fresh("r", "i") is None)
        assert source.view.version == version


async def test_stands_while_the_store_is_away_and_catches_up() -> None:
    async with _source() as (store, source):
        await store.commit([_endpoint("r1")])
        await eventually(lambda: len(source.view.endpoints) == 1)
        store.set_available(False)
        age = source.age_seconds()
        await eventually(lambda: source.age_seconds() > age)
        assert len(source.view.endpoints) == 1
        store.set_available(True)
        await store.commit([_endpoint("r2")])
        await eventually(lambda: len(source.view.endpoints) == 2)


async def test_wait_changed_wakes_with_the_next_view_or_the_time() -> None:
    async with _source() as (store, source):
        await eventually(lambda: source.view.synced)
        version = source.view.version
        assert (await source.wait_changed(version, 0.01)).version == version
        waiting = asyncio.create_task(source.wait_changed(version, 5), name="wait")
        await asyncio.sleep(0)
        await store.commit([_endpoint("r1")])
        assert (await waiting).version > version


async def test_unreadable_store_is_no_view() -> None:
    store = MemoryStore(SystemClock())
    store.set_available(False)
    source = ViewSource(store, SystemClock(), take_in_flight_peak=lambda _replica: 0)
    assert not source.view.synced
    assert source.age_seconds() == float("inf")
    await store.close()
