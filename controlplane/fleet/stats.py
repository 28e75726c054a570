"""Keeps each engine's latest sample in the store, on leases, so that a dead engine's sample disappears.

In come samples, once a period from each agent, and wait in memory for a moment, the latest of each engine
only; out go the samples of many agents in one transaction. A thousand agents cost ten transactions a second,
not a thousand. A store that is away costs the samples of that time: the next period brings newer ones.
"""

import asyncio
from collections.abc import Iterable

import structlog
from millrace.core.v1 import stats_pb2
from prometheus_client import Counter

from core.clock import Clock
from core.store import Lease, LeaseLost, Put, Store, StoreError, keys

_log = structlog.get_logger(__name__)

# Samples that come within this go together. Routers see a sample that much later, a tenth of its period.
GATHER_SECONDS = 0.1
# Readers treat a sample as unknown after 5 s anyway; the lease only cleans up. Every so often a new lease
# takes over all samples that are still being written, and what fell silent goes with the old one: no lease
# is ever renewed.
LEASE_EPOCH_SECONDS = 5.0
LEASE_SECONDS = 15
# Below etcd's bound of 128 operations a transaction.
WRITES_PER_COMMIT = 100

_written = Counter("millrace_fleet_samples_written_total", "Samples of engines that reached the store")
_lost = Counter("millrace_fleet_samples_lost_total", "Samples of engines that the store did not take")


class StatsWriter:
    """The one writer of `stats/`. `run` must be running."""

    def __init__(self, store: Store, clock: Clock) -> None:
        self._store = store
        self._clock = clock
        self._waiting: dict[str, bytes] = {}
        self._filled = asyncio.Event()
        self._lease: Lease | None = None
        self._leased_at = 0.0
        self._away = False

    def put(self, samples: Iterable[stats_pb2.EngineStats]) -> None:
        """Takes samples; each replaces one of its engine that still waits, so that nothing piles up."""
        for sample in samples:
            key = keys.stats(sample.namespace, sample.deployment, sample.replica)
            self._waiting[key] = sample.SerializeToString()
        if self._waiting:
            self._filled.set()

    async def run(self) -> None:
        """Writes what has come, at once after a quiet time and in batches under load."""
        while True:
            await self._filled.wait()
            self._filled.clear()
            waiting, self._waiting = list(self._waiting.items()), {}
            try:
                for start in range(0, len(waiting), WRITES_PER_COMMIT):
                    await self._write(waiting[start : start + WRITES_PER_COMMIT])
            except StoreError as error:
                _lost.inc(len(waiting))
                if not self._away:
                    _log.warning("samples are lost, the store is away", error=str(error))
                self._away = True
            else:
                self._away = False
            await self._clock.sleep(GATHER_SECONDS)

    async def _write(self, batch: list[tuple[str, bytes]]) -> None:
        try:
            await self._write_once(batch)
        except LeaseLost:
            self._lease = None
            await self._write_once(batch)
        _written.inc(len(batch))

    async def _write_once(self, batch: list[tuple[str, bytes]]) -> None:
        lease = await self._current_lease()
        await self._store.commit([Put(key, value, lease_id=lease.lease_id) for key, value in batch])

    async def _current_lease(self) -> Lease:
        now = self._clock.monotonic()
        if self._lease is None or now - self._leased_at >= LEASE_EPOCH_SECONDS:
            self._lease = await self._store.grant_lease(LEASE_SECONDS)
            self._leased_at = now
        return self._lease
