"""The faults that a test can order: which request is hit, and what then happens to the process.

In: fault settings, and a call for every inference request. Out: a `Fate` for the request.
Must not: exit the process by itself in a way a test cannot replace (`exit_process` is injected).
"""

import enum
import os
from collections.abc import Callable

from nodeagent.engines.simulator.settings import FaultSettings

CRASH_EXIT_CODE = 70


class Fate(enum.Enum):
    """What becomes of one inference request."""

    SERVE = "serve"
    STALL = "stall"
    CRASH = "crash"


class Faults:
    """Counts inference requests and chooses their fate."""

    def __init__(self, settings: FaultSettings, exit_process: Callable[[int], object] = os._exit) -> None:
        self.settings = settings
        self._exit_process = exit_process
        self._accepted = 0

    def next_fate(self) -> Fate:
        """The fate of the next request; a crash comes before a stall."""
        count = self._accepted
        self._accepted += 1
        crash = self.settings.crash_after_requests
        if crash is not None and count >= crash:
            return Fate.CRASH
        stall = self.settings.stall_after_requests
        if stall is not None and count >= stall:
            return Fate.STALL
        return Fate.SERVE

    def dies_after(self, tokens: int) -> bool:
        """Whether a stream that has sent this many tokens takes the engine with it."""
        limit = self.settings.mid_stream_death_after_tokens
        return limit is not None and tokens >= limit

    def crash(self) -> None:
        """Ends the process as a kill would: nothing is flushed, closed or said."""
        self._exit_process(CRASH_EXIT_CODE)
