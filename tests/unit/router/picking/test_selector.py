"""The selector: what it counts, what it learns, what it never picks."""

from collections import Counter
from dataclasses import fields, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from millrace.core.v1 import stats_pb2

from core.clock import to_timestamp
from router.picking.contract import Candidate, RequestContext
from router.picking.eligibility import eligible
from router.picking.prefill_ledger import Entry, PrefillLedger
from router.picking.registry import build_strategy
from router.picking.selector import Flight, Selector
from router.prefix.index import REMEMBERED
from router.upstream.loads import LoadTable
from router.view.samples import SampleTable
from router.view.view import Endpoint, EndpointState
from tests.support.candidates import endpoint, request
from tests.support.clock import ManualClock

ENDPOINTS = [endpoint(f"r{n}") for n in range(4)]
PROMPT = "Once upon a time there was a very long prompt. " * 40


def _selector(strategy: str = "default") -> Selector:
    return Selector(build_strategy(strategy), loads=LoadTable(), samples=SampleTable(ManualClock()))


def _request(selector: Selector, prompt: str = PROMPT) -> RequestContext:
    read = selector.read_prompt({"prompt": prompt}, ENDPOINTS, namespace="a", deployment="d")
    return replace(request(), prompt=read)


def _send(selector: Selector, prompt: str = PROMPT) -> tuple[str, Flight]:
    context = _request(selector, prompt)
    chosen = selector.choose(context, ENDPOINTS)
    assert chosen is not None
    return chosen.endpoint.replica, selector.send(context, chosen)


def test_counts_before_the_await_and_releases_once() -> None:
    selector = _selector()
    replica, flight = _send(selector)
    tokens = len(PROMPT) // 4
    assert selector.ledger.pending_tokens(replica) == tokens
    flight.first_byte()
    assert selector.ledger.pending_tokens(replica) == 0
    flight.close()
    assert selector.choose(_request(selector), ENDPOINTS[:1]) is not None
    replica, flight = _send(selector, "Something else altogether. " * 40)
    flight.close()
    assert selector.ledger.pending_tokens(replica) == 0


def test_a_prompt_goes_back_to_where_it_is_cached() -> None:
    selector = _selector()
    replica, flight = _send(selector)
    flight.close()
    for turn in range(1, 5):
        again, flight = _send(selector, PROMPT + "and then " * turn * 30)
        assert again == replica
        flight.close()


def test_a_restarted_engine_has_nothing_cached() -> None:
    selector = _selector()
    replica, flight = _send(selector)
    flight.close()
    restarted = [endpoint(each.replica, incarnation="j") for each in ENDPOINTS]
    selector.retain(restarted)
    assert len(selector.index) == 0
    context = _request(selector)
    assert selector.index.match(context.prompt.chain) == {}
    assert replica


@pytest.mark.parametrize("strategy", ["default", "prefix=3,kv=2,load=2"])
def test_counts_stay_true_while_endpoints_leave_and_come_back(strategy: str) -> None:
    loads = LoadTable()
    selector = Selector(build_strategy(strategy), loads=loads, samples=SampleTable(ManualClock()))
    endpoints, flights = tuple(ENDPOINTS), []
    for turn in range(20):
        context = _request(selector, PROMPT + f"{turn:04d}")
        chosen = selector.choose(context, endpoints)
        assert chosen is not None
        assert chosen.in_flight == loads.in_flight(chosen.endpoint.replica)
        assert chosen.pending_prefill_tokens == selector.ledger.pending_tokens(chosen.endpoint.replica)
        if turn % 3:
            # Nobody is there for a moment, between a choice and what is sent or after it.
            loads.retain(set())
        if turn % 3 == 2:
            selector.retain(())
        flights.append(selector.send(context, chosen))
        if turn % 4:
            flights.pop(0).close()
        assert loads.total == len(flights)
        assert (
            sum(loads.in_flight(each.replica) for each in endpoints) == len(flights) == len(selector.ledger)
        )
    for each in flights:
        each.close()
    loads.retain(set())
    selector.retain(())
    assert (loads.total, len(selector.ledger), selector.ledger.tokens) == (0, 0, 0)
    assert not selector._alike


def test_strategies_that_read_no_prompt_hash_none() -> None:
    selector = _selector("least-pending")
    assert _request(selector).prompt.chain == ()


def test_blocks_and_capacity_are_the_engines_own() -> None:
    clock = ManualClock()
    samples = SampleTable(clock)
    selector = Selector(build_strategy("default"), loads=LoadTable(), samples=samples)
    for each in ENDPOINTS:
        stats = stats_pb2.EngineStats(
            replica=each.replica,
            incarnation=each.incarnation,
            sample_time=to_timestamp(clock.now()),
            kv_cache_tokens=96,
            kv_block_tokens=48,
        )
        samples.record(stats, own_in_flight=0)
    context = _request(selector)
    # Whole blocks of the engine.
    assert context.prompt.block_tokens == 96
    assert len(context.prompt.chain) == len(PROMPT) // (4 * 96)
    chosen = selector.choose(context, ENDPOINTS)
    assert chosen is not None
    selector.send(context, chosen).close()
    assert selector.index.blocks_at(chosen.endpoint.identity) == REMEMBERED


def test_new_prefixes_settle_where_caches_turn_over_slowly() -> None:
    selector = _selector()
    for number in range(9):
        # Two of three went to the first engine; nothing is in flight any more.
        context = _request(selector, f"{number:04d}" + PROMPT)
        at = ENDPOINTS[0 if number % 3 else 1]
        selector.send(context, Candidate(at, None, 0)).close()
    fresh = _request(selector, "new" + PROMPT)
    chosen = selector.choose(fresh, ENDPOINTS[:2])
    assert chosen is not None
    assert chosen.endpoint.replica == ENDPOINTS[1].replica
    known = selector.choose(_request(selector, "0001" + PROMPT), ENDPOINTS[:2])
    assert known is not None
    assert known.endpoint.replica == ENDPOINTS[0].replica


def test_weights_say_how_endpoints_compare_and_not_how_much_load_counts() -> None:
    """What is published has 100 each; it must be chosen from as 1 each is."""

    def spread(weight: int) -> list[str]:
        selector, sent = _selector(), []
        endpoints = [endpoint(f"r{n}", weight=weight) for n in range(4)]
        for number in range(60):
            context = _request(selector, PROMPT + f"{number:04d}")
            chosen = selector.choose(context, endpoints)
            assert chosen is not None
            selector.send(context, chosen)
            sent.append(chosen.endpoint.replica)
        return sent

    assert spread(100) == spread(1)
    assert max(Counter(spread(100)).values()) <= 20


@pytest.mark.parametrize("strategy", ["default", "prefix=3,kv=2,load=2"])
def test_a_decision_keeps_what_was_seen_and_not_the_body(strategy: str) -> None:
    selector = _selector(strategy)
    context = replace(_request(selector), body=b" " * 1_000_000)
    warm = selector.choose(context, ENDPOINTS)
    assert warm is not None
    flights = [selector.send(context, warm) for _ in range(8)]
    again = selector.choose(context, ENDPOINTS)
    decision = selector.decision
    assert again is not None
    assert decision is not None
    for each in flights:
        # What comes later changes nothing of it.
        each.close()
    candidates = decision.candidates()
    assert [each.endpoint for each in candidates] == ENDPOINTS
    assert decision.chosen == candidates.index(again)
    hot = next(each for each in candidates if each.endpoint == warm.endpoint)
    assert (hot.cached_tokens, hot.in_flight, hot.alike_in_flight) == (448, 8, 8)
    # A thousand decisions are kept for whoever asks; each would keep its body alive.
    assert all(getattr(decision, each.name) is not context for each in fields(decision))


def test_a_first_byte_tells_that_all_before_it_are_computed() -> None:
    ledger = PrefillLedger()
    first, second, third = (Entry("a", tokens) for tokens in (10, 20, 40))
    other = Entry("b", 5)
    for each in (first, second, third, other):
        ledger.add(each)
    ledger.computed(second)
    assert ledger.pending_tokens("a") == 40
    for each in (first, second, third, third, other):
        ledger.drop(each)
    assert (ledger.pending_tokens("a"), ledger.pending_tokens("b")) == (0, 0)
    assert not ledger._tokens
    assert not ledger._entries


STRATEGIES = ["default", "least-cost", "prefix-aware", "prefix=3,kv=2,load=2", "session-affinity"]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_one_prefix_for_all_makes_no_hot_spot(strategy: str) -> None:
    """100 % shared prefix: within 1.3x between engines, and more than 90 % of tokens hit."""
    selector = _selector(strategy)
    flights: list[Flight] = []
    sent: Counter[str] = Counter()
    hit = total = 0
    for number in range(2000):
        context = replace(_request(selector, PROMPT + f"{number:04d}"), session="one")
        chosen = selector.choose(context, ENDPOINTS)
        assert chosen is not None
        sent[chosen.endpoint.replica] += 1
        hit += chosen.cached_tokens if context.prompt.chain else 1
        total += context.prompt.tokens if context.prompt.chain else 1
        flights.append(selector.send(context, chosen))
        if len(flights) > 40:
            # The oldest ends wherever it is, so that nothing but the picking evens out.
            flight = flights.pop(0)
            flight.first_byte()
            flight.close()
    counts = [sent[each.replica] for each in ENDPOINTS]
    if strategy != "session-affinity":
        assert max(counts) <= 1.3 * min(counts)
    # One session is one engine's as far as the guard lets it.
    assert max(counts) <= 0.5 * sum(counts)
    assert hit / total > 0.9


@settings(deadline=None)
@given(
    st.lists(st.sampled_from(EndpointState), min_size=1, max_size=8),
    st.lists(st.integers(0, 5), min_size=1, max_size=30),
    st.sampled_from([*STRATEGIES, "weighted", "random", "least-queue", "least-load", "lora-affinity"]),
)
def test_a_draining_endpoint_is_never_chosen(
    states: list[EndpointState], prompts: list[int], strategy: str
) -> None:
    selector = _selector(strategy)
    endpoints = [endpoint(f"r{n}", state) for n, state in enumerate(states)]
    everyone = [endpoint(each.replica) for each in endpoints]
    for number in prompts:
        context = _request(selector, f"{number}" * 500)
        # What was learned while an endpoint was ready must not bring it back.
        warm = selector.choose(context, everyone)
        assert warm is not None
        selector.send(context, warm).close()
        chosen = selector.choose(context, _usable(endpoints))
        if chosen is None:
            assert not _usable(endpoints)
        else:
            assert chosen.endpoint.state in (EndpointState.READY, EndpointState.UNHEALTHY)


def _usable(endpoints: list[Endpoint]) -> list[Endpoint]:
    return list(eligible(endpoints, tried=(), is_ejected=lambda _: False, last_failure_seconds=lambda _: 0.0))


@settings(deadline=None)
@given(st.text(min_size=200, max_size=400), st.permutations(range(4)))
def test_two_routers_agree_on_a_cold_prefix(prompt: str, order: list[int]) -> None:
    for strategy in ("prefix-aware",):
        one, two = _selector(strategy), _selector(strategy)
        first = one.choose(_request(one, prompt), ENDPOINTS)
        second = two.choose(_request(two, prompt), [ENDPOINTS[at] for at in order])
        assert first is not None
        assert second is not None
        assert first.endpoint == second.endpoint
