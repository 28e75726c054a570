"""Waits grow, are bounded, jittered, and start over."""

from hypothesis import given
from hypothesis import strategies as st

from core.backoff import Backoff, BackoffPolicy


def test_waits_double_up_to_the_maximum() -> None:
    policy = BackoffPolicy(initial_seconds=1.0, maximum_seconds=10.0)
    assert [policy.ceiling_seconds(n) for n in range(7)] == [0, 1, 2, 4, 8, 10, 10]


def test_success_starts_over() -> None:
    backoff = Backoff(BackoffPolicy(initial_seconds=1.0, jitter_ratio=0.0))
    assert [backoff.failed(), backoff.failed()] == [1.0, 2.0]
    backoff.succeeded()
    assert backoff.failed() == 1.0


@given(st.integers(1, 10_000), st.floats(0, 1))
def test_waits_stay_within_bounds(failures: int, jitter: float) -> None:
    policy = BackoffPolicy(jitter_ratio=jitter)
    wait = Backoff(policy, failures=failures - 1).failed()
    ceiling = policy.ceiling_seconds(failures)
    assert ceiling * (1 - jitter) <= wait <= ceiling <= policy.maximum_seconds
