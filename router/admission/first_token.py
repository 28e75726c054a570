"""99th percentile of the time to first token over about the last minute, in bounded memory.

In come durations, out comes a percentile: a ring of windows, each a count for every bucket, buckets growing
by a quarter. The answer is the upper bound of its bucket, so it is too large by a quarter at most. Pure.
"""

import math

WINDOW_SECONDS = 10.0
WINDOWS = 6
# From 1 ms on: 64 steps of a quarter end beyond twenty minutes.
_FIRST_MS = 1.0
_BUCKETS = 64
_LOG_STEP = math.log(1.25)


class FirstTokenTimes:
    """Durations of one deployment."""

    def __init__(self) -> None:
        self._windows: list[list[int]] = []
        self._window_number = -1

    def add(self, seconds: float, now_seconds: float) -> None:
        """Counts one duration.

        Args:
            seconds: The duration.
            now_seconds: The present, on any clock that only goes forward.
        """
        self._turn(now_seconds)
        milliseconds = seconds * 1000.0
        bucket = 0 if milliseconds <= _FIRST_MS else math.ceil(math.log(milliseconds / _FIRST_MS) / _LOG_STEP)
        self._windows[0][min(bucket, _BUCKETS - 1)] += 1

    def p99_ms(self, now_seconds: float) -> float | None:
        """Returns the percentile, milliseconds; None where nothing came within the last minute."""
        if not self._windows:
            return None
        self._turn(now_seconds)
        counts = [sum(column) for column in zip(*self._windows, strict=True)]
        total = sum(counts)
        if not total:
            return None
        rank, seen = math.ceil(total * 0.99), 0
        for bucket, count in enumerate(counts):
            seen += count
            if seen >= rank:
                return _FIRST_MS * math.exp(bucket * _LOG_STEP)
        raise AssertionError("the ranks of a histogram end within it")

    def _turn(self, now_seconds: float) -> None:
        number = int(now_seconds / WINDOW_SECONDS)
        passed = number - self._window_number
        if passed <= 0 and self._windows:
            return
        fresh = [[0] * _BUCKETS for _ in range(min(passed, WINDOWS) if self._windows else 1)]
        self._windows = (fresh + self._windows)[:WINDOWS]
        self._window_number = number
