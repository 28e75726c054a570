"""The store in this process: etcd's semantics without etcd, for tests and simulations.

In come calls of `core.store.types.Store`, out come the same answers that etcd would give: revisions,
guarded transactions, leases on an injected clock, watches over a bounded history. `compact`,
`set_available` and `expire_lease` bring about what etcd does only on bad days. Nothing is written to
disk and nothing is shared between processes.
"""

import asyncio
import itertools
from collections import deque
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field

from core.clock import Clock, SystemClock
from core.store.checks import check_range, check_transaction, check_watch
from core.store.types import (
    Commit,
    Compacted,
    Compare,
    Delete,
    KeyValue,
    Lease,
    LeaseLost,
    Operation,
    Page,
    Put,
    StoreError,
    StoreUnavailable,
    WatchBatch,
    WatchEvent,
)
from core.store.waiting import is_set_within

# Revisions kept for watches and old snapshots; older ones are compacted away, as etcd is set up to do.
HISTORY_REVISIONS = 100_000

_PROGRESS_SECONDS = 5.0
_GIVE_UP_SECONDS = 30.0


@dataclass(slots=True)
class _Granted:
    """A lease that lives.

    Attributes:
        ttl_seconds: Time to live.
        deadline: Monotonic time at which it expires.
        keys: Keys attached to it.
    """

    ttl_seconds: float
    deadline: float
    keys: set[str] = field(default_factory=set)


@dataclass(frozen=True, slots=True)
class _Version:
    """A key's content from `revision` on; None for deleted."""

    revision: int
    value: KeyValue | None


class MemoryStore:
    """`Store` in memory. Belongs to one event loop."""

    def __init__(self, clock: Clock | None = None, *, history_revisions: int = HISTORY_REVISIONS) -> None:
        self._clock: Clock = clock or SystemClock()
        self._history_revisions = history_revisions
        # A fresh etcd is at revision 1.
        self._revision = 1
        self._compacted = 0
        self._versions: dict[str, list[_Version]] = {}
        self._log: deque[WatchBatch] = deque()
        self._leases: dict[int, _Granted] = {}
        self._lease_ids = itertools.count(1)
        self._wakers: set[asyncio.Event] = set()
        self._available = True
        self._away_since = 0.0
        self._closed = False

    def set_available(self, available: bool) -> None:
        """Simulates an outage: while unavailable, calls fail and watches are silent.

        Leases go on lapsing meanwhile, as when the network is cut on our side.
        """
        if self._available and not available:
            self._away_since = self._clock.monotonic()
        self._available = available
        self._wake()

    async def compact(self, revision: int) -> None:
        """Forgets what only snapshots before `revision` need.

        Raises:
            Compacted: Already done up to there.
            StoreError: The revision lies in the future.
        """
        if revision <= self._compacted:
            raise Compacted(revision, self._compacted)
        if revision > self._revision:
            raise StoreError(f"revision {revision} is in the future ({self._revision})")
        self._forget_before(revision)
        self._wake()

    def expire_lease(self, lease_id: int) -> None:
        """Ends a lease as if its time had run out."""
        self._leases[lease_id].deadline = self._clock.monotonic()
        self._expire()

    async def close(self) -> None:
        """Makes every call and watch fail from now on."""
        self._closed = True
        self._wake()

    async def get(self, key: str) -> KeyValue | None:
        """Reads one key."""
        await self._enter(f"reading {key}")
        return self._at(key, self._revision)

    async def list(
        self,
        prefix: str,
        *,
        start_after: str = "",
        limit: int = 0,
        revision: int = 0,
        keys_only: bool = False,
    ) -> Page:
        """Reads a prefix as of one revision."""
        check_range(prefix, limit=limit, revision=revision)
        await self._enter(f"listing {prefix}")
        if revision > self._revision:
            raise StoreError(f"revision {revision} is in the future ({self._revision})")
        if revision and revision < self._compacted:
            raise Compacted(revision, self._compacted)
        snapshot = revision or self._revision
        items: list[KeyValue] = []
        for key in sorted(self._versions):
            if not key.startswith(prefix) or key <= start_after:
                continue
            found = self._at(key, snapshot)
            if found is None:
                continue
            if limit and len(items) == limit:
                return Page(tuple(items), snapshot, more=True)
            items.append(_without_value(found) if keys_only else found)
        return Page(tuple(items), snapshot)

    async def commit(self, operations: Sequence[Operation], *, compares: Sequence[Compare] = ()) -> Commit:
        """Writes all or nothing, as one revision."""
        check_transaction(operations, compares)
        await self._enter("writing")
        if not all(self._holds(compare) for compare in compares):
            return Commit(succeeded=False, revision=self._revision)
        for operation in operations:
            if isinstance(operation, Put) and operation.lease_id and operation.lease_id not in self._leases:
                raise LeaseLost(f"the lease is gone (writing {operation.key})")
        self._apply(operations)
        return Commit(succeeded=True, revision=self._revision)

    async def grant_lease(self, ttl_seconds: int) -> Lease:
        """Grants a lease."""
        await self._enter("granting a lease")
        lease_id = next(self._lease_ids)
        ttl = float(max(1, ttl_seconds))
        self._leases[lease_id] = _Granted(ttl, self._clock.monotonic() + ttl)
        # Watches sleep until the next lease expires: this one may be it.
        self._wake()
        return _MemoryLease(self, lease_id, ttl)

    async def keep_alive(self, lease_id: int) -> None:
        """Renews a lease; called by the lease itself."""
        await self._enter("renewing a lease")
        granted = self._leases.get(lease_id)
        if granted is None:
            raise LeaseLost("the lease has expired or was revoked")
        granted.deadline = self._clock.monotonic() + granted.ttl_seconds

    async def revoke(self, lease_id: int) -> None:
        """Ends a lease; called by the lease itself."""
        await self._enter("revoking a lease")
        self._end_lease(lease_id)

    def watch(self, prefix: str, *, start_revision: int) -> AsyncGenerator[WatchBatch, None]:
        """Yields changes from a revision on; see the contract."""
        check_watch(prefix, start_revision)
        return self._watch(prefix, start_revision)

    async def _watch(self, prefix: str, start_revision: int) -> AsyncGenerator[WatchBatch, None]:
        waker = asyncio.Event()
        self._wakers.add(waker)
        next_revision = start_revision
        progress_at = self._clock.monotonic()
        try:
            while True:
                waker.clear()
                now = self._clock.monotonic()
                self._expire()
                self._raise_if_closed(f"watching {prefix}")
                give_up_at = self._away_since + _GIVE_UP_SECONDS
                if self._available:
                    if next_revision < self._compacted:
                        raise Compacted(next_revision, self._compacted)
                    batch = self._next_batch(prefix, next_revision)
                    if batch is None and now >= progress_at:
                        batch = WatchBatch((), max(self._revision, next_revision - 1))
                    if batch is not None:
                        progress_at = now + _PROGRESS_SECONDS
                        next_revision = batch.revision + 1
                        yield batch
                        continue
                elif now >= give_up_at:
                    raise StoreUnavailable(
                        f"nothing was heard for {_GIVE_UP_SECONDS:.0f} s while watching {prefix}"
                    )
                until = progress_at if self._available else give_up_at
                expiries = (granted.deadline for granted in self._leases.values())
                until = min((until, *expiries))
                await is_set_within(self._clock, until - now, waker)
        finally:
            self._wakers.discard(waker)

    def _next_batch(self, prefix: str, next_revision: int) -> WatchBatch | None:
        if not self._log or self._log[-1].revision < next_revision:
            return None
        # Every revision has one entry, so that the position follows from the number.
        first = max(0, next_revision - self._log[0].revision)
        for batch in itertools.islice(self._log, first, None):
            events = tuple(each for each in batch.events if each.key.startswith(prefix))
            if events:
                return WatchBatch(events, batch.revision)
        return None

    async def _enter(self, doing: str) -> None:
        # Lets others run, as a real call would, so that races show in tests.
        await asyncio.sleep(0)
        self._raise_if_closed(doing)
        if not self._available:
            raise StoreUnavailable(f"the store is away ({doing})")
        self._expire()

    def _raise_if_closed(self, doing: str) -> None:
        if self._closed:
            raise StoreUnavailable(f"the store is closed ({doing})")

    def _at(self, key: str, revision: int) -> KeyValue | None:
        for version in reversed(self._versions.get(key, ())):
            if version.revision <= revision:
                return version.value
        return None

    def _holds(self, compare: Compare) -> bool:
        found = self._at(compare.key, self._revision)
        if compare.mod_revision is not None:
            return (found.mod_revision if found else 0) == compare.mod_revision
        return (found.create_revision if found else 0) == compare.create_revision

    def _apply(self, operations: Sequence[Operation]) -> None:
        revision = self._revision + 1
        events: list[WatchEvent] = []
        for operation in operations:
            old = self._at(operation.key, self._revision)
            if old is None and not isinstance(operation, Put):
                continue
            if old is not None and old.lease_id in self._leases:
                self._leases[old.lease_id].keys.discard(operation.key)
            new: KeyValue | None = None
            if isinstance(operation, Put):
                new = KeyValue(
                    key=operation.key,
                    value=operation.value,
                    create_revision=old.create_revision if old else revision,
                    mod_revision=revision,
                    lease_id=operation.lease_id,
                )
                if operation.lease_id:
                    self._leases[operation.lease_id].keys.add(operation.key)
            self._versions.setdefault(operation.key, []).append(_Version(revision, new))
            events.append(WatchEvent(operation.key, new))
        if not events:
            return
        self._revision = revision
        self._log.append(WatchBatch(tuple(events), revision))
        # In steps, since forgetting goes through all keys.
        if len(self._log) > self._history_revisions * 1.1 + 1:
            self._forget_before(revision - self._history_revisions)
        self._wake()

    def _forget_before(self, revision: int) -> None:
        self._compacted = revision
        while self._log and self._log[0].revision < revision:
            self._log.popleft()
        for key, versions in list(self._versions.items()):
            newest = max(
                (index for index, each in enumerate(versions) if each.revision <= revision),
                default=0,
            )
            kept = versions[newest:]
            if len(kept) == 1 and kept[0].value is None:
                del self._versions[key]
            else:
                self._versions[key] = kept

    def _expire(self) -> None:
        now = self._clock.monotonic()
        for lease_id in [each for each, granted in self._leases.items() if granted.deadline <= now]:
            self._end_lease(lease_id)

    def _end_lease(self, lease_id: int) -> None:
        granted = self._leases.get(lease_id)
        if granted is None:
            return
        from_lease = [Delete(key) for key in sorted(granted.keys)]
        del self._leases[lease_id]
        if from_lease:
            self._apply(from_lease)

    def _wake(self) -> None:
        for waker in self._wakers:
            waker.set()


@dataclass(frozen=True, slots=True)
class _MemoryLease:
    """A lease of a `MemoryStore`."""

    _store: MemoryStore
    lease_id: int
    ttl_seconds: float

    async def keep_alive(self) -> None:
        """Renews once."""
        await self._store.keep_alive(self.lease_id)

    async def revoke(self) -> None:
        """Ends it; already gone is fine."""
        await self._store.revoke(self.lease_id)


def _without_value(found: KeyValue) -> KeyValue:
    return KeyValue(found.key, b"", found.create_revision, found.mod_revision, lease_id=found.lease_id)
