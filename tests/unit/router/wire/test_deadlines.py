"""One coarse timer watches everything, and ticks only while there is something to watch."""

from collections.abc import AsyncIterator

import pytest_asyncio

from router.wire.deadlines import NEVER, Deadlines
from tests.support.clock import ManualClock


class _Item:
    def __init__(self, deadline_seconds: float) -> None:
        self.deadline_seconds = deadline_seconds
        self.calls = 0

    def overdue(self) -> None:
        self.calls += 1


@pytest_asyncio.fixture
async def clock() -> ManualClock:
    return ManualClock()


@pytest_asyncio.fixture
async def deadlines(clock: ManualClock) -> AsyncIterator[Deadlines]:
    made = Deadlines(clock)
    yield made
    made.close()


async def test_only_what_is_overdue_is_told(clock: ManualClock, deadlines: Deadlines) -> None:
    now = clock.monotonic()
    soon, late, never = _Item(now + 1), _Item(now + 2), _Item(NEVER)
    for item in (soon, late, never):
        deadlines.watch(item)
    deadlines._tick()
    await clock.advance(1.5)
    deadlines._tick()
    assert [item.calls for item in (soon, late, never)] == [1, 0, 0]
    soon.deadline_seconds = NEVER
    await clock.advance(1.5)
    deadlines._tick()
    assert [item.calls for item in (soon, late, never)] == [1, 1, 0]


async def test_what_is_forgotten_is_not_told(clock: ManualClock, deadlines: Deadlines) -> None:
    class Last(_Item):
        def overdue(self) -> None:
            super().overdue()
            for each in items:
                deadlines.forget(each)

    items = [Last(clock.monotonic()), Last(clock.monotonic())]
    for item in items:
        deadlines.watch(item)
    deadlines._tick()
    assert sum(item.calls for item in items) == 1
    assert len(deadlines) == 0
    assert deadlines._timer is None


async def test_an_error_in_one_does_not_stop_the_clock(clock: ManualClock, deadlines: Deadlines) -> None:
    class Broken(_Item):
        def overdue(self) -> None:
            raise ValueError("broken")

    deadlines.watch(Broken(clock.monotonic()))
    try:
        deadlines._tick()
    except ValueError:
        assert deadlines._timer is not None
