"""Puts an engine's batches in order: notices gaps, repetitions and restarts, and says what to do.

In: batches as they come live, and batches that a replay brings. Out: a mirror that holds what the engine
holds, or less, never more. A replay begins with the last batch that was applied, whose time tells whether
it still is the same process that answers.

    live in order           applied
    live, already applied   ignored
    live, later or earlier  RESYNC: replay, then the same batch again
    replay in order         applied
    replay of another run   everything forgotten, replay from 0
    replay with holes       tried again; then everything forgotten, and on from the next live batch
    replay without its end  noticed when the next live batch comes; until then the mirror is behind

Must not: know sockets or wait.
"""

from enum import Enum

from nodeagent.kv_events.codec import Batch
from nodeagent.kv_events.mirror import CacheMirror

# A replay that loses messages is asked for again so often before the past is given up.
REPLAYS_MAX = 4


class Verdict(Enum):
    """What became of a live batch."""

    APPLIED = "applied"
    REPEATED = "repeated"
    RESYNC = "resync"


class Feed:
    """The order of one publisher's batches; `resyncs_total` counts what went wrong."""

    def __init__(self, mirror: CacheMirror, *, replayable: bool = True) -> None:
        """Takes the mirror to fill, and whether the publisher repeats its past."""
        self.mirror = mirror
        self._replayable = replayable
        self.resyncs_total = 0
        # None: nothing is known of where the engine is.
        self._next: int | None = None
        self._last_seconds = 0.0
        self._suspicious = False
        self._verifying = False
        self._broken = False
        self._replayed = 0
        self._replays = 0

    def suspect(self) -> None:
        """Notes that the connection was lost: the next batch may be another process's."""
        self._suspicious = self._next is not None

    def offer(self, batch: Batch) -> Verdict:
        """Takes a live batch, or says that a replay has to come first."""
        if self._next is None and not self._replayable:
            self._begin_with(batch)
            return Verdict.APPLIED
        if self._next is None or self._suspicious or batch.sequence > self._next:
            return Verdict.RESYNC
        if batch.sequence < self._next:
            return Verdict.REPEATED if batch.time_seconds <= self._last_seconds else Verdict.RESYNC
        self._apply(batch)
        return Verdict.APPLIED

    def force(self, batch: Batch) -> None:
        """Goes on from a live batch although batches before it are lost."""
        self._suspicious = False
        self._begin_with(batch)

    # --- replay -----------------------------------------------------------------------------------

    def begin_replay(self) -> int:
        """The sequence number to ask a replay from."""
        if self._next is None:
            self._restart()
        self._verifying = bool(self._next)
        self._broken = False
        self._replayed = 0
        self._replays += 1
        self._suspicious = False
        return max((self._next or 0) - 1, 0)

    def replay(self, batch: Batch) -> None:
        """Takes a batch of a replay; those after a hole are of no use."""
        if self._broken or self._next is None:
            return
        self._replayed += 1
        if self._verifying:
            self._verifying = False
            if batch.sequence == self._next - 1:
                if batch.time_seconds != self._last_seconds:
                    self._restart()
                    self._broken = True
                return
            # The engine no longer has what we know last: what is known may be of another process.
            self._begin_with(batch)
        elif batch.sequence == self._next:
            self._apply(batch)
        elif batch.sequence > self._next:
            if self._next == 0 and self._replayed == 1:
                self._begin_with(batch)
            else:
                self._broken = True

    def end_replay(self) -> bool:
        """Ends a replay; True where another one is needed."""
        if self._verifying:
            # The engine never got as far as we did: it is another process.
            self._restart()
            self._broken = True
        if self._broken and self._replays < REPLAYS_MAX:
            return True
        if self._broken:
            self.give_up()
        self._replays = 0
        return False

    def give_up(self) -> None:
        """Forgets everything, because the past is not to be had."""
        self.mirror.reset(complete=False)
        self._next = None
        self._replays = 0
        self._suspicious = False

    # --- inside -----------------------------------------------------------------------------------

    def _restart(self) -> None:
        self.resyncs_total += 1
        self.mirror.reset(complete=True)
        self._next = 0

    def _begin_with(self, batch: Batch) -> None:
        self.mirror.reset(complete=batch.sequence == 0)
        self._apply(batch)

    def _apply(self, batch: Batch) -> None:
        self.mirror.apply(batch.events)
        self._next = batch.sequence + 1
        self._last_seconds = batch.time_seconds
