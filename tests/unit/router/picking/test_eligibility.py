"""Which endpoints may be used at all."""

from hypothesis import given
from hypothesis import strategies as st

from router.picking.eligibility import eligible
from router.view.view import Endpoint, EndpointState


def _endpoint(number: int, state: EndpointState) -> Endpoint:
    return Endpoint("a", "d", f"r{number}", "http://h", "d", "m", state, "i", 1, "n")


def _eligible(
    states: list[EndpointState], *, ejected: dict[int, float] | None = None, tried: set[int] | None = None
) -> list[int]:
    failures = {f"r{number}": when for number, when in (ejected or {}).items()}
    found = eligible(
        [_endpoint(number, state) for number, state in enumerate(states)],
        tried={(f"r{number}", "i") for number in tried or ()},
        is_ejected=lambda each: each.replica in failures,
        last_failure_seconds=lambda each: failures.get(each.replica, float("-inf")),
    )
    return [int(each.replica[1:]) for each in found]


READY, DRAINING, UNHEALTHY = EndpointState.READY, EndpointState.DRAINING, EndpointState.UNHEALTHY


def test_order_of_preference() -> None:
    assert _eligible([READY, UNHEALTHY, READY]) == [0, 2]
    assert _eligible([READY, UNHEALTHY, READY], ejected={0: 5.0}) == [2]
    assert _eligible([READY, UNHEALTHY, READY], ejected={0: 5.0, 2: 4.0}) == [2]
    assert _eligible([READY, UNHEALTHY, READY], tried={0, 2}) == [1]
    assert _eligible([UNHEALTHY, UNHEALTHY], ejected={0: 1.0}) == [1]
    assert _eligible([DRAINING, EndpointState.UNSPECIFIED]) == []
    assert _eligible([]) == []


_numbers = st.integers(0, 7)


@given(
    st.lists(st.sampled_from(EndpointState), max_size=8),
    st.dictionaries(_numbers, st.floats(0, 100)),
    st.sets(_numbers),
)
def test_laws(states: list[EndpointState], ejected: dict[int, float], tried: set[int]) -> None:
    found = _eligible(states, ejected=ejected, tried=tried)
    usable = {
        number for number, state in enumerate(states) if state in (READY, UNHEALTHY) and number not in tried
    }
    assert set(found) <= usable
    # Ejection alone never refuses.
    assert bool(found) == bool(usable)
    if any(states[number] is READY for number in usable):
        assert all(states[number] is READY for number in found)
