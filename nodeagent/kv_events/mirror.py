"""A copy of which blocks one engine holds, and what changed lately.

In: events in order, and resets where the order was lost. Out: the present blocks, and net changes by
sequence number for those who keep copies of this copy. A reset begins a new epoch: sequence numbers of
one epoch mean nothing in another, and a reader begins anew with a snapshot. Nobody has a queue of his own:
readers that lag behind the kept changes begin anew as well, so a slow router costs no memory.
Must not: know sockets, messages or engines.
"""

import asyncio
import secrets
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

from core.block_hash import block_hash, event_hash
from nodeagent.kv_events.codec import Cleared, Event, Removed, Stored

# Blocks of one cache; the largest caches that are built today have a tenth of it. 4 Mi of them are
# about 400 MB, and a feed that says otherwise is not believed.
BLOCKS_MAX = 4 * 2**20
# Hashes in the changes that are kept for readers: some seconds of a busy engine.
CHANGED_HASHES_MAX = 2**18
CHANGES_MAX = 2**14


class HashScheme(Enum):
    """How an engine makes its hashes."""

    UNKNOWN = "unknown"
    SHA256_PICKLE = "sha256_pickle"
    OTHER = "other"


@dataclass(frozen=True, slots=True)
class Change:
    """A net change: no hash is in both lists; `cleared` comes first."""

    sequence: int
    cleared: bool
    removed: tuple[int, ...]
    stored: tuple[int, ...]


class CacheMirror:
    """The present blocks of one engine, or of one of its data-parallel ranks.

    Attributes:
        incarnation: The run of the engine that it mirrors.
        epoch: Identity of the numbering.
        sequence: Number of the last change.
        complete: Whether every block that the engine holds is known.
        block_tokens: Tokens a block, 0 while unknown.
        hash_scheme: How hashes are made.
        closed: Whether the engine is gone.
    """

    def __init__(
        self,
        incarnation: str = "",
        *,
        blocks_max: int = BLOCKS_MAX,
        changed_hashes_max: int = CHANGED_HASHES_MAX,
    ) -> None:
        """Begins empty and incomplete; the bounds are for tests."""
        self.incarnation = incarnation
        self.complete = False
        self.block_tokens = 0
        self.hash_scheme = HashScheme.UNKNOWN
        self.closed = False
        self.epoch = ""
        self.sequence = 0
        self._blocks_max = blocks_max
        self._changed_hashes_max = changed_hashes_max
        self._present: set[int] = set()
        self._group: int | None = None
        self._changes: deque[Change] = deque()
        self._changed_hashes = 0
        self._changed = asyncio.Event()
        self._renumber()

    @property
    def blocks(self) -> int:
        """How many blocks are known."""
        return len(self._present)

    def present(self) -> frozenset[int]:
        """The present blocks, as a copy."""
        return frozenset(self._present)

    def reset(self, *, complete: bool) -> None:
        """Forgets everything.

        Args:
            complete: Whether what follows is told from the engine's start on.
        """
        self._present.clear()
        self.complete = complete
        self._renumber()

    def close(self) -> None:
        """Marks the engine as gone and wakes the readers."""
        self.closed = True
        self._wake()

    def apply(self, events: Iterable[Event]) -> None:
        """Takes over what one step did."""
        cleared = False
        removed: dict[int, None] = {}
        stored: dict[int, None] = {}
        learned = False
        for event in events:
            if isinstance(event, Cleared):
                self._present.clear()
                removed.clear()
                stored.clear()
                cleared = True
            elif isinstance(event, Removed):
                if event.group is None or self._group in {None, event.group}:
                    self._remove(event.hashes, removed, stored)
            elif self._mirrors(event):
                learned = self._learn(event) or learned
                self._store(event.hashes, removed, stored)
        if len(self._present) > self._blocks_max:
            self.reset(complete=False)
        elif learned:
            # Readers are told the facts together with a snapshot.
            self._renumber()
        elif cleared or removed or stored:
            self._append(Change(self.sequence + 1, cleared, tuple(removed), tuple(stored)))

    def changes_after(self, epoch: str, sequence: int) -> list[Change] | None:
        """What came after a sequence number; None if that is no longer known."""
        if epoch != self.epoch or sequence > self.sequence:
            return None
        if sequence == self.sequence:
            return []
        if not self._changes or self._changes[0].sequence > sequence + 1:
            return None
        return [change for change in self._changes if change.sequence > sequence]

    async def wait(self) -> None:
        """Returns when something has changed after the call."""
        await self._changed.wait()

    def _mirrors(self, event: Stored) -> bool:
        """Whether an event is of the group that is mirrored: the first one of whole prefixes."""
        if not event.whole_prefix:
            return False
        if self._group is None:
            self._group = event.group
        return event.group == self._group

    def _store(self, hashes: Iterable[int], removed: dict[int, None], stored: dict[int, None]) -> None:
        for each in hashes:
            if each in self._present:
                continue
            self._present.add(each)
            if each in removed:
                del removed[each]
            else:
                stored[each] = None

    def _remove(self, hashes: Iterable[int], removed: dict[int, None], stored: dict[int, None]) -> None:
        for each in hashes:
            if each not in self._present:
                continue
            self._present.remove(each)
            if each in stored:
                del stored[each]
            else:
                removed[each] = None

    def _learn(self, event: Stored) -> bool:
        """Learns block size and hash scheme from the first chain that begins; tells if it did."""
        learned = False
        if self.block_tokens != event.block_tokens:
            self.block_tokens = event.block_tokens
            learned = True
        if self.hash_scheme is HashScheme.UNKNOWN and event.parent is None and event.plain and event.hashes:
            ours = event_hash(block_hash(None, event.token_ids[: event.block_tokens]))
            same = ours == event.hashes[0]
            self.hash_scheme = HashScheme.SHA256_PICKLE if same else HashScheme.OTHER
            learned = True
        return learned

    def _append(self, change: Change) -> None:
        self.sequence = change.sequence
        self._changes.append(change)
        self._changed_hashes += len(change.removed) + len(change.stored)
        while len(self._changes) > CHANGES_MAX or self._changed_hashes > self._changed_hashes_max:
            oldest = self._changes.popleft()
            self._changed_hashes -= len(oldest.removed) + len(oldest.stored)
        self._wake()

    def _renumber(self) -> None:
        self.epoch = secrets.token_hex(8)
        self.sequence = 0
        self._changes.clear()
        self._changed_hashes = 0
        self._wake()

    def _wake(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()
