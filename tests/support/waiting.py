"""Waiting for a state of the world instead of sleeping: polls a predicate until it holds."""

import asyncio
import inspect
import time
from collections.abc import Awaitable, Callable


async def eventually(
    predicate: Callable[[], object] | Callable[[], Awaitable[object]],
    *,
    timeout_seconds: float = 5.0,
    interval_seconds: float = 0.02,
    message: str = "",
) -> None:
    """Returns once the predicate is true; fails the test after `timeout_seconds`."""
    deadline = time.monotonic() + timeout_seconds
    while True:
        outcome = predicate()
        if inspect.isawaitable(outcome):
            outcome = await outcome
        if outcome:
            return
        if time.monotonic() > deadline:
            raise AssertionError(message or f"not true within {timeout_seconds} s: {predicate}")
        await asyncio.sleep(interval_seconds)
