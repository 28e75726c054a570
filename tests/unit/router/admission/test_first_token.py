"""The rolling percentile of the time to first token."""

from hypothesis import given
from hypothesis import strategies as st

from router.admission.first_token import FirstTokenTimes


def test_nothing_is_none() -> None:
    times = FirstTokenTimes()
    assert times.p99_ms(0.0) is None
    times.add(0.1, 5.0)
    assert times.p99_ms(5.0) is not None
    assert times.p99_ms(70.0) is None


def test_old_windows_go_one_by_one() -> None:
    times = FirstTokenTimes()
    times.add(10.0, 1.0)
    for second in range(2, 60):
        times.add(0.01, float(second))
    slow = times.p99_ms(59.0)
    assert slow is not None
    assert slow >= 10_000
    fast = times.p99_ms(61.0)
    assert fast is not None
    assert fast < 20


@given(st.lists(st.floats(0.001, 600), min_size=1, max_size=300))
def test_the_percentile_is_at_most_a_quarter_too_large(durations: list[float]) -> None:
    times = FirstTokenTimes()
    for each in durations:
        times.add(each, 3.0)
    exact = sorted(durations)[-(-len(durations) * 99 // 100) - 1] * 1000
    found = times.p99_ms(3.0)
    assert found is not None
    assert exact * 0.999 <= found <= exact * 1.26
