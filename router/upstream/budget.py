"""The retry budget: retries help against a few broken engines and must not double a general overload.

A bucket of tokens: every request puts in a fifth, time puts in ten a second, every retry takes one out.
In come requests and retries, out comes whether a retry is allowed.
"""

from core.clock import Clock

# One retry in five requests in the long run: load grows by a fifth at worst when everything fails.
RETRIES_PER_REQUEST = 0.2
# A router with little traffic must still be able to fail over.
RETRIES_PER_SECOND = 10.0
# An engine that dies with a full batch makes all of it retry at once; vLLM's default batch is 256.
BURST = 256.0


class RetryBudget:
    """Token bucket that starts full."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._tokens = BURST
        self._refilled_seconds = clock.monotonic()

    @property
    def tokens(self) -> float:
        """Retries that are allowed at this moment."""
        self._refill()
        return self._tokens

    def request(self) -> None:
        """Counts a request."""
        self._tokens = min(BURST, self._tokens + RETRIES_PER_REQUEST)

    def take(self) -> bool:
        """Takes a retry out; False when there is none left."""
        self._refill()
        # Fifths do not add up exactly.
        if self._tokens < 1.0 - 1e-9:
            return False
        self._tokens -= 1.0
        return True

    def _refill(self) -> None:
        now = self._clock.monotonic()
        self._tokens = min(BURST, self._tokens + (now - self._refilled_seconds) * RETRIES_PER_SECOND)
        self._refilled_seconds = now
