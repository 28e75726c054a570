"""Keeps each engine's latest sample in the store, on a lease, so that a dead engine's sample disappears.

In come samples once a period, out goes one transaction a node. One lease a node is granted and renewed as
samples arrive; when a node falls silent its samples expire.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from millrace.core.v1 import stats_pb2

from core.clock import Clock
from core.store import Lease, LeaseLost, Put, Store, keys

# Readers treat a sample as unknown after 5 s anyway; the lease only cleans up.
LEASE_SECONDS = 15
RENEW_SECONDS = 5.0
# Below etcd's bound of 128 operations a transaction.
WRITES_PER_COMMIT = 100


@dataclass(slots=True)
class _NodeLease:
    lease: Lease
    renewed_at: float


class StatsWriter:
    """The one writer of `stats/`."""

    def __init__(self, store: Store, clock: Clock) -> None:
        self._store = store
        self._clock = clock
        self._leases: dict[str, _NodeLease] = {}

    async def write(self, node: str, samples: Sequence[stats_pb2.EngineStats]) -> None:
        """Stores samples.

        Raises:
            StoreUnavailable: The store did not answer; the next period brings newer ones.
        """
        if not samples:
            return
        lease = await self._lease(node)
        for start in range(0, len(samples), WRITES_PER_COMMIT):
            await self._store.commit(
                [
                    Put(
                        keys.stats(sample.namespace, sample.deployment, sample.replica),
                        sample.SerializeToString(),
                        lease_id=lease.lease_id,
                    )
                    for sample in samples[start : start + WRITES_PER_COMMIT]
                ]
            )

    def forget(self, node: str) -> None:
        """Lets a node's lease run out."""
        self._leases.pop(node, None)

    async def _lease(self, node: str) -> Lease:
        now = self._clock.monotonic()
        held = self._leases.get(node)
        if held is not None and now - held.renewed_at < RENEW_SECONDS:
            return held.lease
        if held is not None:
            try:
                await held.lease.keep_alive()
            except LeaseLost:
                held = None
        if held is None:
            held = _NodeLease(await self._store.grant_lease(LEASE_SECONDS), now)
            self._leases[node] = held
        held.renewed_at = now
        return held.lease
