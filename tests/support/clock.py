"""A clock that tests own: time moves only when the test says so."""

import asyncio
from datetime import UTC, datetime, timedelta


class ManualClock:
    """Sleepers wake when `advance` passes their deadline."""

    def __init__(self, start: datetime = datetime(2030, 1, 1, tzinfo=UTC)) -> None:
        self._start = start
        self._elapsed = 0.0
        self._sleepers: list[tuple[float, asyncio.Future[None]]] = []

    def now(self) -> datetime:
        return self._start + timedelta(seconds=self._elapsed)

    def monotonic(self) -> float:
        return self._elapsed

    async def sleep(self, seconds: float) -> None:
        if seconds <= 0:
            await asyncio.sleep(0)
            return
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._sleepers.append((self._elapsed + seconds, future))
        await future

    async def advance(self, seconds: float) -> None:
        """Moves time on, waking sleepers in order and letting each run before the next."""
        target = self._elapsed + seconds
        await _settle()
        while due := sorted((each for each in self._sleepers if each[0] <= target), key=lambda each: each[0]):
            moment, future = due[0]
            self._sleepers.remove(due[0])
            self._elapsed = max(self._elapsed, moment)
            if not future.done():
                future.set_result(None)
            await _settle()
        self._elapsed = target
        await _settle()


async def _settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)
