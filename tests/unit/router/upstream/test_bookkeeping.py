"""Loads, passive health, retry budget: what a router counts by itself."""

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.upstream.budget import BURST, RetryBudget
from router.upstream.health import Breaker, EndpointHealth
from router.upstream.loads import LoadTable
from router.view.view import Endpoint, EndpointState, Routing
from tests.support.clock import ManualClock


def _endpoint(replica: str = "r", incarnation: str = "i") -> Endpoint:
    return Endpoint("a", "d", replica, "http://h", "d", "m", EndpointState.READY, incarnation, 1, "n")


@given(st.lists(st.tuples(st.sampled_from("abc"), st.booleans()), max_size=20))
def test_in_flight_returns_to_zero_however_requests_end(requests: list[tuple[str, bool]]) -> None:
    loads = LoadTable()

    async def one(replica: str, fails: bool) -> None:
        with loads.hold(replica):
            await asyncio.sleep(0)
            if fails:
                raise RuntimeError

    async def all_of_them() -> None:
        tasks = [asyncio.ensure_future(one(*each)) for each in requests]
        await asyncio.sleep(0)
        assert loads.total == len(requests)
        for task in tasks[::3]:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    asyncio.run(all_of_them())
    assert loads.total == 0
    assert all(loads.in_flight(replica) == 0 for replica in "abc")


def test_load_is_counted_before_the_first_await() -> None:
    loads = LoadTable()
    with loads.hold("r"), loads.hold("r"):
        assert loads.in_flight("r") == 2
    assert loads.in_flight("r") == 0


def test_peak_is_the_most_since_it_was_taken() -> None:
    loads = LoadTable()
    with loads.hold("r"):
        with loads.hold("r"), loads.hold("r"):
            pass
        assert loads.take_peak("r") == 3
        assert loads.take_peak("r") == 1
    assert loads.take_peak("r") == 1
    assert loads.take_peak("r") == 0


def test_a_replica_with_requests_is_not_forgotten() -> None:
    loads = LoadTable()
    load = loads.of("r")
    loads.begin_at(load)
    loads.retain(set())
    # Whoever comes now counts beside the request that is still there.
    assert loads.of("r") is load
    assert (loads.version, loads.in_flight("r")) == (0, 1)
    loads.end("r")
    loads.retain(set())
    assert loads.version == 1
    assert loads.of("r") is not load


async def test_ejection_doubles_up_to_its_bound_and_success_clears_it() -> None:
    clock = ManualClock()
    health = EndpointHealth(clock)
    endpoint = _endpoint()
    for expected in (1, 2, 4, 8, 16, 30, 30):
        assert health.failed(endpoint) == pytest.approx(expected)
        assert health.is_ejected(endpoint)
        await clock.advance(expected - 0.01)
        assert health.is_ejected(endpoint)
        await clock.advance(0.02)
        assert not health.is_ejected(endpoint)
    health.succeeded(endpoint)
    assert health.failed(endpoint) == pytest.approx(1)


async def test_failures_of_one_moment_are_one_failure() -> None:
    clock = ManualClock()
    health = EndpointHealth(clock)
    for _ in range(100):
        health.failed(_endpoint())
    await clock.advance(1.01)
    assert not health.is_ejected(_endpoint())


def test_new_incarnation_starts_clean_and_the_gone_are_forgotten() -> None:
    health = EndpointHealth(ManualClock())
    health.failed(_endpoint())
    assert not health.is_ejected(_endpoint(incarnation="next"))
    assert health.last_failure_seconds(_endpoint(incarnation="next")) == float("-inf")
    # A late success of the new run does not clear the old one's mark, and the other way round.
    health.succeeded(_endpoint(incarnation="next"))
    assert health.is_ejected(_endpoint())
    health.retain([_endpoint(incarnation="next")])
    assert not health.is_ejected(_endpoint())


async def test_one_request_probes_while_the_others_stay_away() -> None:
    clock = ManualClock()
    health = EndpointHealth(clock)
    endpoint = _endpoint()
    with health.probe(endpoint):
        assert not health.is_ejected(endpoint)
    health.failed(endpoint)
    # A request that comes although it is ejected, because all are, is no probe.
    with health.probe(endpoint):
        await clock.advance(1.0)
        assert not health.is_ejected(endpoint)
    with health.probe(endpoint):
        assert health.is_ejected(endpoint)
        with health.probe(endpoint):
            pass
        assert health.is_ejected(endpoint)
    # It ended without a verdict: the next may probe.
    assert not health.is_ejected(endpoint)
    with health.probe(endpoint):
        assert health.failed(endpoint) == pytest.approx(2)
    assert health.is_ejected(endpoint)
    await clock.advance(2.0)
    with health.probe(endpoint):
        health.succeeded(endpoint)
        assert not health.is_ejected(endpoint)
    assert not health.is_ejected(endpoint)


async def test_budget_is_a_fifth_of_the_requests_and_ten_a_second() -> None:
    clock = ManualClock()
    budget = RetryBudget(clock)
    assert sum(budget.take() for _ in range(1000)) == int(BURST)
    for _ in range(50):
        budget.request()
    assert sum(budget.take() for _ in range(1000)) == 10
    await clock.advance(1.0)
    assert sum(budget.take() for _ in range(1000)) == 10
    await clock.advance(3600.0)
    assert budget.tokens == BURST


async def test_a_deployment_may_have_a_breaker_of_its_own() -> None:
    clock = ManualClock()
    health = EndpointHealth(clock)
    breaker = Breaker.of(Routing(consecutive_failures=3, ejection_seconds=40.0))
    one = _endpoint()
    for _ in range(2):
        assert health.failed(one, breaker) == 0.0
        assert not health.is_ejected(one)
    with health.probe(one):
        # An endpoint that has not been ejected is no probe: the others need not stay away.
        assert not health.is_ejected(one)
    assert not health.clean
    assert health.failed(one, breaker) == 40.0
    assert health.is_ejected(one)
    await clock.advance(40.1)
    assert not health.is_ejected(one)
    with health.probe(one):
        assert health.is_ejected(one)
    health.succeeded(one)
    assert health.clean
    assert Breaker.of(Routing()) == Breaker()
