"""One coarse timer for all waits of the hot path.

In come things that have a deadline, out go calls of their `overdue` when it has passed, at most TICK_SECONDS
late. To move a deadline is to set an attribute: a stream that is watched for silence costs one assignment a
piece, where a timer of the event loop costs an entry in its heap and its removal. It ticks only while there
is something to watch. Bounded by what is watched: requests in flight and kept connections.
"""

import asyncio
from typing import Protocol

from core.clock import Clock

# The shortest bound that is configured anywhere is the connect time-out of seconds.
TICK_SECONDS = 0.05
NEVER = float("inf")


class Watched(Protocol):
    """Something that must not take for ever.

    Attributes:
        deadline_seconds: On the monotonic clock; NEVER while nothing is awaited.
    """

    deadline_seconds: float

    def overdue(self) -> None:
        """The deadline has passed; called again at every tick until it is moved or no longer watched."""
        ...


class Deadlines:
    """Watches deadlines. One a worker."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._watched: set[Watched] = set()
        self._timer: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        return len(self._watched)

    def watch(self, item: Watched) -> None:
        """Begins to watch something; again does nothing."""
        self._watched.add(item)
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(TICK_SECONDS, self._tick)

    def forget(self, item: Watched) -> None:
        """Ends to watch something; again does nothing."""
        self._watched.discard(item)

    def close(self) -> None:
        """Watches nothing any more."""
        self._watched.clear()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _tick(self) -> None:
        # Before anything else, so that an error in one of them does not stop the clock of the others.
        self._timer = asyncio.get_running_loop().call_later(TICK_SECONDS, self._tick)
        now = self._clock.monotonic()
        for item in [each for each in self._watched if each.deadline_seconds <= now]:
            if item in self._watched:
                item.overdue()
        if not self._watched:
            self._timer.cancel()
            self._timer = None
