"""Filters, scorers and pickers, one table each."""

from collections import Counter
from collections.abc import Sequence
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.picking.contract import Candidate, Filter, RequestContext, Scorer
from router.picking.full_cache_guard import FullCacheGuard
from router.picking.hot_spot_guard import HotSpotGuard
from router.picking.least_cost import LeastCost
from router.picking.least_kv_cache import LeastKvCache
from router.picking.least_load import LeastLoad
from router.picking.least_pending import LeastPending
from router.picking.least_queue import LeastQueue
from router.picking.lora_affinity import LoraAffinity
from router.picking.prefix_aware import PrefixAware
from router.picking.random_choice import RandomChoice
from router.picking.session_affinity import SessionAffinity
from router.picking.weighted import Weighted
from tests.support.candidates import candidate, request, sample

PLAIN = request()


def test_random_draws_evenly_and_repeats_with_its_seed() -> None:
    candidates = [candidate(name) for name in "abcd"]
    draws = [
        [RandomChoice(Random(7)).pick(PLAIN, candidates, ()).endpoint.replica],
        [RandomChoice(Random(7)).pick(PLAIN, candidates, ()).endpoint.replica],
    ]
    assert draws[0] == draws[1]
    picker = RandomChoice(Random(7))
    counts = Counter(picker.pick(PLAIN, candidates, ()).endpoint.replica for _ in range(2000))
    assert all(400 < counts[name] < 600 for name in "abcd")


def test_weighted_takes_turns_by_weight_and_interleaves() -> None:
    picker = Weighted()
    candidates = [candidate("a", weight=5), candidate("b"), candidate("c")]
    picks = "".join(picker.pick(PLAIN, candidates, ()).endpoint.replica for _ in range(14))
    assert Counter(picks) == {"a": 10, "b": 2, "c": 2}
    assert "bc" not in picks
    assert "aaaa" not in picks[:7]


@pytest.mark.parametrize(
    ("waiting", "scores"),
    [
        ([0, 10, 5], [1.0, 0.0, 0.5]),
        ([3, 3, 3], [1.0, 1.0, 1.0]),
        # Unknown counts as the mean.
        ([0, 10, None], [1.0, 0.0, 0.5]),
        ([None, None, None], [1.0, 1.0, 1.0]),
    ],
)
def test_least_queue(waiting: list[int | None], scores: list[float]) -> None:
    candidates = [candidate(str(n), seen=sample(waiting=each)) for n, each in enumerate(waiting)]
    assert LeastQueue().score(PLAIN, candidates) == scores


@pytest.mark.parametrize(
    ("used", "scores"), [([0.2, 0.8, None], [0.8, 0.2, 0.5]), ([None, None], [0.5, 0.5])]
)
def test_least_load(used: list[float | None], scores: list[float]) -> None:
    candidates = [
        candidate(str(n), seen=sample(device_utilization_ratio=each)) for n, each in enumerate(used)
    ]
    assert LeastLoad().score(PLAIN, candidates) == pytest.approx(scores)


def test_least_kv_cache_falls_fast_near_full() -> None:
    usages = [0.0, 0.5, 0.9, 0.99, 1.0, None]
    candidates = [candidate(str(n), seen=sample(kv=each)) for n, each in enumerate(usages)]
    scores = LeastKvCache().score(PLAIN, candidates)
    assert scores[:4] == pytest.approx([1.0, 0.87, 0.43, 0.06], abs=0.01)
    assert scores[4] < 0.01
    assert scores[2] < scores[5] < scores[1]


@pytest.mark.parametrize(
    ("usages", "kept"),
    [
        ([0.5, 0.99, None], "02"),
        ([0.97, 0.98], "0"),
        # It never empties the list.
        ([0.99, 1.0], "01"),
    ],
)
def test_full_cache_guard(usages: list[float | None], kept: str) -> None:
    candidates = [candidate(str(n), seen=sample(kv=each)) for n, each in enumerate(usages)]
    assert _names(FullCacheGuard().keep(PLAIN, candidates)) == kept


@pytest.mark.parametrize(
    ("in_flight", "alike", "kept"),
    [
        ([2, 0, 0, 0], 2, "0123"),
        ([3, 0, 0, 0], 3, "123"),
        # One idle endpoint is enough to turn the busy ones away.
        ([13, 13, 13, 0], 13, "3"),
        ([50, 20, 30, 20], 50, "123"),
        ([20, 21, 22, 20], 20, "0123"),
        # A prefix that few share is worth a queue, but not any queue.
        ([16, 0, 0, 0], 2, "0123"),
        ([17, 0, 0, 0], 2, "123"),
        ([100], 100, "0"),
    ],
)
def test_hot_spot_guard(in_flight: list[int], alike: int, kept: str) -> None:
    candidates = [candidate(str(n), in_flight=each, alike=alike) for n, each in enumerate(in_flight)]
    assert _names(HotSpotGuard().keep(PLAIN, candidates)) == kept


def test_prefix_aware_follows_the_cache() -> None:
    candidates = [candidate("a", cached=50), candidate("b", cached=100), candidate("c")]
    assert PrefixAware().score(request(tokens=200, chain=(1,)), candidates) == [0.25, 0.5, 0.0]


def test_a_cold_prefix_goes_to_the_same_endpoint_from_every_router() -> None:
    candidates = [candidate(name) for name in "abcdefgh"]
    for key in range(50):
        cold = request(tokens=100, chain=(key, key + 1))
        first, second = (PrefixAware().score(cold, each) for each in (candidates, candidates[::-1]))
        assert sum(first) == 0.1
        assert first.index(0.1) == len(candidates) - 1 - second.index(0.1)


def test_session_affinity_keeps_sessions() -> None:
    candidates = [candidate(name) for name in "abcdefgh"]
    chosen: list[int] = []
    for number in range(400):
        scores = SessionAffinity().score(request(session=f"s-{number}"), candidates)
        assert scores == SessionAffinity().score(request(session=f"s-{number}"), candidates)
        chosen.append(scores.index(max(scores)))
    assert all(20 < count < 90 for count in Counter(chosen).values())
    assert set(SessionAffinity().score(PLAIN, candidates)) == {0.0}


def test_lora_affinity() -> None:
    candidates = [
        candidate("loaded", seen=sample(adapters=frozenset({"x"}), adapters_max=1)),
        candidate("room", seen=sample(adapters=frozenset({"y"}), adapters_max=2)),
        candidate(
            "waiting",
            seen=sample(adapters=frozenset({"y"}), adapters_max=1, adapters_waiting=frozenset({"x"})),
        ),
        candidate("none", seen=sample(adapters=frozenset({"y"}), adapters_max=1)),
        candidate("unknown"),
    ]
    assert LoraAffinity().score(request(adapter="x"), candidates) == [1.0, 0.8, 0.6, 0.0, 0.8]
    assert set(LoraAffinity().score(PLAIN, candidates)) == {0.8}


@pytest.mark.parametrize(
    ("candidates", "best"),
    [
        # A cached prefix is worth a queue.
        ([candidate("a", cached=900, pending=4000), candidate("b")], "a"),
        # But not any queue.
        ([candidate("a", cached=100, pending=4000), candidate("b")], "b"),
        # Equal prefixes: what waits decides, then how many.
        ([candidate("a", cached=900, pending=10), candidate("b", cached=900)], "b"),
        ([candidate("a", cached=900, in_flight=3), candidate("b", cached=900, in_flight=2)], "b"),
        ([candidate("a", in_flight=3, weight=3), candidate("b", in_flight=2)], "a"),
        # Others count.
        ([candidate("a", seen=sample(running=9)), candidate("b", seen=sample(running=1))], "b"),
    ],
)
def test_least_cost(candidates: list[Candidate], best: str) -> None:
    scores = LeastCost().score(request(tokens=1000), candidates)
    assert candidates[scores.index(max(scores))].endpoint.replica == best


def _names(candidates: Sequence[Candidate]) -> str:
    return "".join(each.endpoint.replica for each in candidates)


_share = st.none() | st.floats(0, 1)
_count = st.none() | st.integers(0, 1000)
_samples = st.none() | st.builds(
    lambda running, waiting, kv, used, own: sample(
        running=running, waiting=waiting, kv=kv, device_utilization_ratio=used, own_in_flight=own
    ),
    _count,
    _count,
    _share,
    _share,
    st.integers(0, 1000),
)
_candidates = st.lists(
    st.tuples(_samples, st.integers(0, 500), st.integers(1, 9), st.integers(0, 5000), st.integers(0, 10**6)),
    min_size=1,
    max_size=9,
).map(
    lambda rows: [
        candidate(str(n), seen=seen, in_flight=own, weight=weight, cached=cached, pending=pending)
        for n, (seen, own, weight, cached, pending) in enumerate(rows)
    ]
)
_requests = st.builds(
    lambda tokens, chain, session, adapter: request(
        tokens=tokens, chain=tuple(chain), session=session, adapter=adapter
    ),
    st.integers(1, 10_000),
    st.lists(st.integers(0, 2**64 - 1), max_size=20),
    st.text(max_size=3),
    st.text(max_size=3),
)

SCORERS: list[Scorer] = [
    LeastCost(),
    LeastKvCache(),
    LeastLoad(),
    LeastPending(),
    LeastQueue(),
    LoraAffinity(),
    PrefixAware(),
    SessionAffinity(),
]
FILTERS: list[Filter] = [FullCacheGuard(), HotSpotGuard()]


@pytest.mark.parametrize("scorer", SCORERS, ids=[type(each).__name__ for each in SCORERS])
@settings(deadline=None)
@given(_requests, _candidates)
def test_scores_lie_between_0_and_1(
    scorer: Scorer, context: RequestContext, candidates: list[Candidate]
) -> None:
    scores = scorer.score(context, candidates)
    assert len(scores) == len(candidates)
    assert all(0 <= score <= 1 for score in scores)


@pytest.mark.parametrize("guard", FILTERS, ids=[type(each).__name__ for each in FILTERS])
@settings(deadline=None)
@given(_requests, _candidates)
def test_filters_never_empty_the_list(
    guard: Filter, context: RequestContext, candidates: list[Candidate]
) -> None:
    kept = guard.keep(context, candidates)
    assert kept
    assert [each for each in candidates if each in kept] == list(kept)
