"""Round robin, least pending, and the registry that puts strategies together."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.errors import InvalidArgument
from router.picking.contract import Candidate, RequestContext, Strategy
from router.picking.highest_score import HighestScore
from router.picking.least_pending import LeastPending
from router.picking.registry import build_strategy, installed_plugins
from router.picking.round_robin import RoundRobin
from router.view.samples import Sample
from router.view.view import Endpoint, EndpointState

REQUEST = RequestContext("id", "/v1/completions", "a", "d", "d", False, b"{}")


def endpoint(
    replica: str, state: EndpointState = EndpointState.READY, *, weight: int = 1, deployment: str = "d"
) -> Endpoint:
    return Endpoint("a", deployment, replica, "http://h", "d", "m", state, "i", weight, "n")


def candidate(replica: str, *, in_flight: int = 0, others: int | None = None, weight: int = 1) -> Candidate:
    sample = None if others is None else Sample("i", 0.0, others, 0, None, 0)
    return Candidate(endpoint(replica, weight=weight), sample, in_flight)


def _pick(strategy: Strategy, candidates: Sequence[Candidate]) -> str:
    chosen = strategy.select(REQUEST, candidates)
    assert chosen is not None
    return chosen.endpoint.replica


def test_round_robin_takes_turns() -> None:
    strategy = build_strategy("round-robin")
    candidates = [candidate(name) for name in "cab"]
    assert [_pick(strategy, candidates) for _ in range(6)] == list("abcabc")


def test_round_robin_goes_on_when_the_list_changes() -> None:
    strategy = build_strategy("round-robin")
    assert [_pick(strategy, [candidate(name) for name in "abc"]) for _ in range(2)] == ["a", "b"]
    assert _pick(strategy, [candidate(name) for name in "abcd"]) == "c"
    assert _pick(strategy, [candidate(name) for name in "abd"]) == "d"
    assert _pick(strategy, [candidate(name) for name in "bd"]) == "b"


def test_round_robin_counts_each_deployment_apart() -> None:
    picker = RoundRobin()
    one, two = (
        [Candidate(endpoint(name, deployment=deployment), None, 0) for name in "ab"]
        for deployment in ("d1", "d2")
    )
    picks = [picker.pick(REQUEST, each, [0, 0]).endpoint.replica for each in (one, two, one, two)]
    assert picks == ["a", "a", "b", "b"]


@given(st.lists(st.lists(st.sampled_from("abcdefgh"), min_size=1, unique=True), min_size=1, max_size=50))
def test_round_robin_always_returns_a_candidate(lists: list[list[str]]) -> None:
    strategy = build_strategy("round-robin")
    for names in lists:
        assert _pick(strategy, [candidate(name) for name in names]) in names


@pytest.mark.parametrize(
    ("candidates", "best"),
    [
        ([candidate("a", in_flight=1), candidate("b", in_flight=0)], {"b"}),
        ([candidate("a", in_flight=1), candidate("b", in_flight=1)], {"a", "b"}),
        # Others' requests count as ours do.
        ([candidate("a", in_flight=1, others=5), candidate("b", in_flight=3, others=0)], {"b"}),
        # Unknown is neither idle nor saturated: the mean of what is known, here 4.
        ([candidate("a", others=8), candidate("b"), candidate("c", others=0)], {"c"}),
        ([candidate("a", others=8), candidate("b")], {"a", "b"}),
        # Twice the weight takes twice the requests.
        ([candidate("a", in_flight=3, weight=2), candidate("b", in_flight=2)], {"a"}),
    ],
)
def test_least_pending(candidates: list[Candidate], best: set[str]) -> None:
    strategy = build_strategy("least-pending")
    assert {_pick(strategy, candidates) for _ in range(4)} == best


@given(
    st.lists(
        st.tuples(st.integers(0, 1000), st.none() | st.integers(0, 1000), st.integers(1, 10)),
        min_size=1,
        max_size=10,
    )
)
def test_least_pending_scores_lie_between_0_and_1(load: list[tuple[int, int | None, int]]) -> None:
    candidates = [
        candidate(str(n), in_flight=own, others=others, weight=weight)
        for n, (own, others, weight) in enumerate(load)
    ]
    scores = LeastPending().score(REQUEST, candidates)
    assert len(scores) == len(candidates)
    assert all(0 < score <= 1 for score in scores)


def test_equal_scores_take_turns() -> None:
    picker = HighestScore()
    candidates = [candidate(name) for name in "abc"]
    picks = Counter(picker.pick(REQUEST, candidates, [0.1, 0.9, 0.9]).endpoint.replica for _ in range(10))
    assert picks == {"b": 5, "c": 5}


def test_no_candidates_is_no_choice() -> None:
    assert build_strategy("least-pending").select(REQUEST, []) is None


class _KeepNone:
    def keep(self, request: RequestContext, candidates: Sequence[Candidate]) -> Sequence[Candidate]:
        return ()


def test_filters_have_a_veto() -> None:
    strategy = build_strategy("none,round-robin", {"none": _KeepNone, "round-robin": RoundRobin})
    assert strategy.select(REQUEST, [candidate("a")]) is None


def test_built_in_plugins_are_registered() -> None:
    assert {"round-robin", "least-pending"} <= set(installed_plugins())


def _broken() -> Any:
    raise RuntimeError("no licence")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("guess", "`guess` is not known; known: broken, odd, one, two"),
        ("", "names no strategy; known: broken, odd, one, two"),
        ("one,two", "2 pickers"),
        ("broken", "no licence"),
        ("odd", "neither a filter nor a scorer nor a picker"),
    ],
)
def test_wrong_strategies_are_refused_at_start(text: str, expected: str) -> None:
    plugins = {"one": RoundRobin, "two": RoundRobin, "broken": _broken, "odd": object}
    with pytest.raises(InvalidArgument, match=expected) as refused:
        build_strategy(text, plugins)
    assert refused.value.violations[0].field == "strategy"
