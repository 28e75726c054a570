"""The contract of the store: what every implementation does, and the values that cross it.

In come keys (text, `core.store.keys`) and opaque bytes; out come values with the revisions that
guard the next write. Nothing here knows what the bytes mean or which program keeps them. Every
method has a bounded wait and raises `StoreUnavailable` when the bound is reached.
"""

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from core.errors import MillraceError, Unavailable


class StoreError(MillraceError):
    """Base of what the store raises."""


class StoreUnavailable(Unavailable, StoreError):
    """No member answered within the bound; the write may or may not have happened."""

    reason = "ERROR_REASON_STORE_UNAVAILABLE"


class Compacted(StoreError):
    """The asked-for revision has been compacted; list again from `compact_revision` or later."""

    reason = "ERROR_REASON_RESOURCE_VERSION_TOO_OLD"

    def __init__(self, revision: int, compact_revision: int) -> None:
        super().__init__(
            f"revision {revision} has been compacted (oldest kept: {compact_revision}); list again"
        )
        self.revision = revision
        self.compact_revision = compact_revision


class LeaseLost(StoreError):
    """The lease has expired or was revoked; its keys are gone."""


@dataclass(frozen=True, slots=True)
class KeyValue:
    """One stored value.

    Attributes:
        key: Full key.
        value: Opaque bytes.
        create_revision: Revision of the write that created the key.
        mod_revision: Revision of the last write; guards the next one.
        lease_id: Lease that the key lives on; 0 for none.
    """

    key: str
    value: bytes
    create_revision: int
    mod_revision: int
    lease_id: int = 0


@dataclass(frozen=True, slots=True)
class Page:
    """A consistent range.

    Attributes:
        items: In key order.
        revision: Revision of the snapshot; a watch from `revision + 1` misses nothing.
        more: True when the limit cut the range.
    """

    items: tuple[KeyValue, ...]
    revision: int
    more: bool = False


@dataclass(frozen=True, slots=True)
class Compare:
    """A condition of a transaction; exactly one of the two revisions is set.

    Attributes:
        key: Full key.
        mod_revision: Last write must be this one; 0 means that the key must not exist.
        create_revision: The key must have been created by this write (fencing).
    """

    key: str
    mod_revision: int | None = None
    create_revision: int | None = None


@dataclass(frozen=True, slots=True)
class Put:
    """Write a value, optionally on a lease."""

    key: str
    value: bytes
    lease_id: int = 0


@dataclass(frozen=True, slots=True)
class Delete:
    """Delete one key; absent is fine."""

    key: str


Operation: TypeAlias = Put | Delete


@dataclass(frozen=True, slots=True)
class Commit:
    """Outcome of a transaction.

    Attributes:
        succeeded: False when a condition did not hold; then nothing was written.
        revision: Revision of the store after it.
    """

    succeeded: bool
    revision: int


@dataclass(frozen=True, slots=True)
class WatchEvent:
    """One change. `value` is None when the key was deleted or its lease expired."""

    key: str
    value: KeyValue | None


@dataclass(frozen=True, slots=True)
class WatchBatch:
    """Changes of one moment; without events it is progress: nothing was missed up to `revision`."""

    events: tuple[WatchEvent, ...]
    revision: int


class Lease(Protocol):
    """A time to live that keys are attached to."""

    @property
    def lease_id(self) -> int:
        """Identifier to put keys on."""
        ...

    @property
    def ttl_seconds(self) -> float:
        """Granted time to live."""
        ...

    async def keep_alive(self) -> None:
        """Renews once.

        Raises:
            LeaseLost: It had expired.
            StoreUnavailable: No answer within the bound.
        """
        ...

    async def revoke(self) -> None:
        """Ends it and deletes its keys; already gone is fine."""
        ...


class Store(Protocol):
    """A key-value store with revisions, as etcd offers it."""

    async def get(self, key: str) -> KeyValue | None:
        """Reads one key, linearizably."""
        ...

    async def list(
        self,
        prefix: str,
        *,
        start_after: str = "",
        limit: int = 0,
        revision: int = 0,
        keys_only: bool = False,
    ) -> Page:
        """Reads all keys that begin with `prefix`, in order.

        Args:
            prefix: Beginning of the keys; must not be empty.
            start_after: Skip keys up to and including this one.
            limit: At most so many items; 0 means all.
            revision: Read the snapshot of that revision; 0 means the latest.
            keys_only: Leave the values empty.

        Raises:
            Compacted: The snapshot of `revision` is gone.
            StoreUnavailable: No answer within the bound.
        """
        ...

    async def commit(self, operations: Sequence[Operation], *, compares: Sequence[Compare] = ()) -> Commit:
        """Applies all operations if all conditions hold, otherwise none.

        Raises:
            ValueError: More than 128 operations or conditions, or one key written twice.
            LeaseLost: A put names a lease that is gone; nothing was written.
            StoreUnavailable: No answer within the bound; the outcome is not known.
        """
        ...

    async def grant_lease(self, ttl_seconds: int) -> Lease:
        """Grants a lease. It is not renewed by itself: `core.store.lease.Presence` does that."""
        ...

    def watch(self, prefix: str, *, start_revision: int) -> AsyncGenerator[WatchBatch, None]:
        """Yields every change of the prefix from `start_revision` on, in order, without gaps.

        One revision is never split over two batches. Idle progress comes at least every 10 s; its
        revision may lag behind the store's. A lost connection is resumed inside; the iterator ends
        only by an error or by being closed, which its user must do (`contextlib.aclosing`).

        Args:
            prefix: Beginning of the keys; must not be empty.
            start_revision: First revision to hear of, at least 1.

        Raises:
            ValueError: `start_revision` is below 1 or the prefix is empty.
            Compacted: `start_revision` is gone, at the start or after a long loss of connection.
            StoreUnavailable: Nothing was heard for 30 s.
        """
        ...

    async def close(self) -> None:
        """Releases connections; pending calls fail with StoreUnavailable."""
        ...
