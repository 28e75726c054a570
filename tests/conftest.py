"""Guards for every test: nothing is left running behind it."""

import asyncio
import os
from collections.abc import AsyncIterator

import pytest_asyncio
from hypothesis import settings

# How long an example takes depends on what else the machine does: a deadline would test the machine.
# On CI the same examples are drawn every time, so that a change is judged by itself.
settings.register_profile("millrace", deadline=None, derandomize=bool(os.environ.get("CI")))
settings.load_profile("millrace")


@pytest_asyncio.fixture(autouse=True)
async def no_leaked_tasks() -> AsyncIterator[None]:
    """Fails a test that leaves tasks of its own behind."""
    before = asyncio.all_tasks()
    yield
    leaked: list[asyncio.Task[object]] = []
    for _ in range(50):
        leaked = [task for task in asyncio.all_tasks() - before if not task.done()]
        leaked = [task for task in leaked if task is not asyncio.current_task()]
        if not leaked:
            return
        await asyncio.sleep(0.01)
    names = ", ".join(sorted(task.get_name() for task in leaked))
    for task in leaked:
        task.cancel()
    raise AssertionError(f"tasks left behind: {names}")
