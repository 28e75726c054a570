"""Samples of many agents, in few transactions, on leases that nobody renews."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest
import pytest_asyncio
from millrace.core.v1 import stats_pb2

from controlplane.fleet.stats import LEASE_SECONDS, StatsWriter
from core.store import Commit, MemoryStore, Operation, keys
from core.tasks import cancel_and_wait
from tests.support.clock import ManualClock


class CountingStore(MemoryStore):
    """Counts transactions."""

    commits = 0

    async def commit(self, operations: Sequence[Operation], **options: Any) -> Commit:
        self.commits += 1
        return await super().commit(operations, **options)


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def store(clock: ManualClock) -> CountingStore:
    return CountingStore(clock)


@pytest_asyncio.fixture
async def writer(store: CountingStore, clock: ManualClock) -> AsyncIterator[StatsWriter]:
    made = StatsWriter(store, clock)
    running = asyncio.create_task(made.run(), name="stats")
    yield made
    await cancel_and_wait(running)


def _sample(replica: str, running: int = 1) -> stats_pb2.EngineStats:
    return stats_pb2.EngineStats(namespace="ns", deployment="d", replica=replica, running_requests=running)


async def _stored(store: MemoryStore) -> dict[str, int]:
    page = await store.list(keys.STATS)
    return {
        sample.replica: sample.running_requests
        for sample in (stats_pb2.EngineStats.FromString(item.value) for item in page.items)
    }


async def test_the_first_is_written_at_once_and_those_behind_it_together(
    writer: StatsWriter, store: CountingStore, clock: ManualClock
) -> None:
    writer.put([_sample("first")])
    await clock.advance(0)
    assert await _stored(store) == {"first": 1}
    for number in range(150):
        writer.put([_sample(f"r{number}")])
    writer.put([_sample("r0", running=7)])
    assert store.commits == 1
    await clock.advance(0.1)
    assert store.commits == 3
    stored = await _stored(store)
    assert len(stored) == 151
    assert stored["r0"] == 7


async def test_samples_of_the_silent_expire_and_those_of_the_others_stay(
    writer: StatsWriter, store: CountingStore, clock: ManualClock
) -> None:
    writer.put([_sample("silent"), _sample("alive")])
    for _ in range(LEASE_SECONDS + 1):
        await clock.advance(1)
        writer.put([_sample("alive")])
    await clock.advance(1)
    assert set(await _stored(store)) == {"alive"}


async def test_a_lost_lease_is_replaced(
    writer: StatsWriter, store: CountingStore, clock: ManualClock
) -> None:
    writer.put([_sample("a")])
    await clock.advance(0.1)
    store.expire_lease((await store.list(keys.STATS)).items[0].lease_id)
    writer.put([_sample("a", running=2)])
    await clock.advance(0.1)
    assert await _stored(store) == {"a": 2}


async def test_a_store_that_is_away_costs_samples_and_nothing_else(
    writer: StatsWriter, store: CountingStore, clock: ManualClock
) -> None:
    store.set_available(available=False)
    for number in range(50):
        writer.put([_sample("a", running=number)])
        await clock.advance(1)
    store.set_available(available=True)
    writer.put([_sample("a", running=99)])
    await clock.advance(1)
    assert await _stored(store) == {"a": 99}
