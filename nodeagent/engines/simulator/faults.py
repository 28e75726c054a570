"""The faults that a test can order: which request is hit, and what then happens to the process.

In: fault settings, and a call for every inference request. Out: a `Fate` for the request.
Must not: exit the process by itself in a way a test cannot replace (`exit_process` is injected).
"""

import asyncio
import enum
import os
import signal
from collections.abc import Callable

from nodeagent.engines.simulator.settings import FaultSettings

CRASH_EXIT_CODE = 70
MEBIBYTE = 2**20
# Small steps, so that the process grows as steadily as a real leak does.
LEAK_STEP_SECONDS = 0.1


def kill_as_the_kernel_does() -> None:
    """Ends the process as the kernel ends one that takes too much memory."""
    os.kill(os.getpid(), signal.SIGKILL)


async def leak(settings: FaultSettings, kill: Callable[[], object] = kill_as_the_kernel_does) -> None:
    """Takes memory for good until the limit, then has the process killed.

    Args:
        settings: How fast, and when it is over.
        kill: Ends the process.
    """
    held: list[bytes] = []
    step_bytes = max(1, int(settings.leak_mebibytes_per_second * LEAK_STEP_SECONDS * MEBIBYTE))
    while len(held) * step_bytes < settings.leak_limit_mebibytes * MEBIBYTE:
        # Random, so that no page is shared or left out: the memory is really taken.
        held.append(os.urandom(step_bytes))
        await asyncio.sleep(LEAK_STEP_SECONDS)
    kill()


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
