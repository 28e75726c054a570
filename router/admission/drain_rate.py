"""How fast a waiting line moves, and when to come again.

In comes the number of requests that have ended, once a second while some wait; out come requests a second as
a moving average, and the seconds of `Retry-After`:

    rate <- rate + (1 - e^(-t / T)) * (ended / t - rate),  T = 10 s, corrected for its start at 0
    Retry-After = (waiting + 1) / rate, rounded up, within 1 to 60 s; 5 s before anything was measured

What ends while nobody waits says how much was asked, not how fast the line would move, and is left out. Pure.
"""

import math

TIME_CONSTANT_SECONDS = 10.0
RETRY_AFTER_SECONDS_MAX = 60
# Before the first measurement: a client that comes again then meets a measured line.
RETRY_AFTER_SECONDS_UNKNOWN = 5


class DrainRate:
    """Of one deployment in this worker."""

    def __init__(self) -> None:
        self._rate = 0.0
        # Share of the average that measurements have; the rest is still the 0 that it began with.
        self._weight = 0.0
        self._before: tuple[int, float] | None = None

    def measure(self, ended_total: int, now_seconds: float, *, waiting: bool) -> None:
        """Takes a measurement.

        Args:
            ended_total: Requests that have ended so far.
            now_seconds: On any clock that only goes forward.
            waiting: True where requests wait now.
        """
        before, self._before = self._before, (ended_total, now_seconds) if waiting else None
        if before is None or not waiting or now_seconds <= before[1]:
            return
        elapsed = now_seconds - before[1]
        share = 1.0 - math.exp(-elapsed / TIME_CONSTANT_SECONDS)
        self._rate += share * ((ended_total - before[0]) / elapsed - self._rate)
        self._weight += share * (1.0 - self._weight)

    @property
    def requests_per_second(self) -> float | None:
        """The rate; None before anything was measured."""
        return self._rate / self._weight if self._weight else None

    def retry_after_seconds(self, waiting: int) -> int:
        """Returns when one who joins behind those who wait would be served, whole seconds, within bounds."""
        rate = self.requests_per_second
        if rate is None:
            return RETRY_AFTER_SECONDS_UNKNOWN
        if rate * RETRY_AFTER_SECONDS_MAX <= waiting + 1:
            return RETRY_AFTER_SECONDS_MAX
        return max(1, math.ceil((waiting + 1) / rate))
