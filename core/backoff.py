"""Exponential back-off with jitter: how long to wait before the next attempt.

In comes the number of failures in a row, out comes a wait in seconds. It does not sleep and keeps no
state beyond the count, so that a caller can show the wait to a person.
"""

import random
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class BackoffPolicy:
    """Bounds of a back-off.

    Attributes:
        initial_seconds: Wait after the first failure.
        maximum_seconds: Longest wait.
        factor: Growth from one failure to the next.
        jitter_ratio: The wait is spread evenly over `1 - jitter_ratio` to 1 times its value, so that
            many callers that failed together do not come back together.
    """

    initial_seconds: float = 0.2
    maximum_seconds: float = 10.0
    factor: float = 2.0
    jitter_ratio: float = 0.5

    def ceiling_seconds(self, failures: int) -> float:
        """Longest wait after so many failures in a row, without jitter."""
        if failures <= 0:
            return 0.0
        # The exponent is bounded: beyond it the maximum rules anyway and floats would overflow.
        return min(self.maximum_seconds, self.initial_seconds * self.factor ** min(failures - 1, 64))


@dataclass(slots=True)
class Backoff:
    """Counts failures in a row and tells the wait.

    Attributes:
        policy: Bounds.
        failures: Failures since the last success.
    """

    policy: BackoffPolicy = field(default_factory=BackoffPolicy)
    failures: int = 0
    _random: random.Random = field(default_factory=random.Random, repr=False)

    def failed(self) -> float:
        """Counts a failure and returns the wait in seconds before the next attempt."""
        self.failures += 1
        ceiling = self.policy.ceiling_seconds(self.failures)
        return ceiling * (1.0 - self.policy.jitter_ratio * self._random.random())

    def succeeded(self) -> None:
        """Starts over."""
        self.failures = 0
