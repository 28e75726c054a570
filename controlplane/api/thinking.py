"""Long thoughts beside the event loop: whole clusters are explained and planned in a thread of their own.

In comes a function over values that nobody changes any more, out comes its result. One is thought through at
a time: two at once would take as long, since threads share one interpreter. It must not be given anything
that waits.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from controlplane.api.limits import THOUGHTS_MAX
from core.errors import ResourceExhausted

T = TypeVar("T")


class Thinking:
    """One thread, and a bounded line in front of it."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="thinking")
        self._asked = 0

    async def think(self, thought: Callable[[], T]) -> T:
        """Has the thread call a function.

        Raises:
            ResourceExhausted: Too many callers wait already.
        """
        if self._asked >= THOUGHTS_MAX:
            raise ResourceExhausted(
                f"{THOUGHTS_MAX} dry runs and explanations are being worked out; try again in a few seconds"
            )
        self._asked += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, thought)
        finally:
            self._asked -= 1
