import asyncio
import threading

import pytest

from controlplane.api.limits import THOUGHTS_MAX
from controlplane.api.thinking import Thinking
from core.errors import ResourceExhausted


async def test_the_loop_goes_on_while_a_thought_is_worked_out() -> None:
    thinking, go_on = Thinking(), threading.Event()
    thought = asyncio.create_task(thinking.think(lambda: go_on.wait(10)))
    # The thought ends only if this task runs beside it.
    await asyncio.sleep(0)
    go_on.set()
    assert await thought


async def test_the_line_is_bounded_and_opens_again() -> None:
    thinking, go_on = Thinking(), threading.Event()
    thoughts = [asyncio.create_task(thinking.think(lambda: go_on.wait(10))) for _ in range(THOUGHTS_MAX)]
    await asyncio.sleep(0)
    with pytest.raises(ResourceExhausted, match="try again in a few seconds"):
        await thinking.think(lambda: True)
    go_on.set()
    assert all(await asyncio.gather(*thoughts))
    assert await thinking.think(lambda: True)


async def test_an_error_reaches_who_asked_and_leaves_the_line() -> None:
    thinking = Thinking()

    def wrong() -> None:
        raise ValueError("no")

    for _ in range(THOUGHTS_MAX + 1):
        with pytest.raises(ValueError, match="no"):
            await thinking.think(wrong)
