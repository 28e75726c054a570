"""Waiting with a bound that an injected clock measures.

In comes an awaitable and a limit in seconds, out comes its result or `TimeoutError`. asyncio's own
timeouts run on the loop's time, which a test cannot move; these run on `core.clock.Clock`. No task
outlives the call.
"""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from core.clock import Clock
from core.tasks import cancel_and_wait

T = TypeVar("T")


async def within(
    clock: Clock, seconds: float, body: Coroutine[Any, Any, T], *, name: str = "bounded-wait"
) -> T:
    """Runs a coroutine for at most so many seconds of the clock.

    Args:
        clock: Measures the bound.
        seconds: The bound; zero or less gives the coroutine one pass of the loop.
        body: What to run; cancelled when the bound is reached.
        name: Of the task, for those who look at a stuck process.

    Raises:
        TimeoutError: The bound was reached.
    """
    work = asyncio.create_task(body, name=name)
    limit = asyncio.create_task(clock.sleep(max(0.0, seconds)), name=f"{name}-limit")
    try:
        await asyncio.wait({work, limit}, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise TimeoutError(f"{name}: not done within {seconds:.1f} s")
        return work.result()
    finally:
        await cancel_and_wait(*(task for task in (work, limit) if not task.done()))


async def is_set_within(clock: Clock, seconds: float, event: asyncio.Event) -> bool:
    """Waits for an event for at most so many seconds; tells whether it is set."""
    if event.is_set():
        return True
    try:
        await within(clock, seconds, event.wait(), name="event-wait")
    except TimeoutError:
        return event.is_set()
    return True
