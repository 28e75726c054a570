"""The compiled default strategy chooses what its plug-ins choose, whatever the endpoints look like."""

from datetime import UTC, datetime, timedelta

from hypothesis import given, settings
from hypothesis import strategies as st
from millrace.core.v1 import stats_pb2

from core.clock import to_timestamp
from router.picking.contract import Candidate, RequestContext
from router.picking.registry import build_strategy
from router.picking.selector import Flight, Selector
from router.prefix.prompt import Prompt
from router.upstream.loads import LoadTable
from router.view.samples import SampleTable
from router.view.view import Endpoint
from tests.support.candidates import endpoint, request


class _Clock:
    """Time that is set."""

    seconds = 0.0

    def now(self) -> datetime:
        return datetime(2030, 1, 1, tzinfo=UTC) + timedelta(seconds=self.seconds)

    def monotonic(self) -> float:
        return self.seconds

    async def sleep(self, seconds: float) -> None:
        raise NotImplementedError(f"nothing sleeps here ({seconds} s)")


# Chains of a few families: equal heads, different tails.
_prompts = st.builds(
    lambda family, length, fork: Prompt(
        tokens=64 * length + 30,
        block_tokens=64,
        chain=[family * 1000 + at + (100 * fork if at >= 2 else 0) for at in range(length)],
    ),
    st.integers(1, 3),
    st.integers(0, 6),
    st.integers(0, 2),
)
_samples = st.none() | st.builds(
    lambda running, waiting, kv, age: (running, waiting, kv, age),
    st.none() | st.integers(0, 60),
    st.none() | st.integers(0, 20),
    st.none() | st.floats(0.0, 1.0) | st.just(0.99),
    st.sampled_from([0.0, 3.0, 7.0]),
)
_steps = st.lists(
    st.tuples(_prompts, st.sampled_from(["close", "first byte", "stay", "stay", "stay"]), st.integers(0, 3)),
    min_size=1,
    max_size=60,
)


def _selector(generic: bool, clock: _Clock) -> tuple[Selector, SampleTable]:
    samples = SampleTable(clock)
    selector = Selector(build_strategy("default"), loads=LoadTable(), samples=samples)
    assert selector._compiled is not None
    if generic:
        selector._compiled = None
    return selector, samples


@settings(max_examples=80, deadline=None)
@given(
    st.lists(_samples, min_size=1, max_size=6),
    st.sampled_from([1, 3, 100]),
    st.booleans(),
    _steps,
)
def test_both_ways_choose_alike(
    engines: list[tuple[int | None, int | None, float | None, float] | None],
    weight: int,
    ordered: bool,
    steps: list[tuple[Prompt, str, int]],
) -> None:
    clock = _Clock()
    # A view has them in the order of their ids, what is left of one may come in any order.
    names = [f"r{at}" for at in range(len(engines))]
    endpoints = tuple(endpoint(name, weight=weight) for name in (names if ordered else reversed(names)))
    sides = [_selector(generic, clock) for generic in (False, True)]
    for each, told in zip(endpoints, engines, strict=True):
        if told is not None:
            for _, samples in sides:
                samples.record(_stats(each, told, clock), own_in_flight=0)
    flights: list[list[Flight]] = [[], []]
    for prompt, fate, passing in steps:
        clock.seconds += 0.3 * passing
        asked = request()
        asked.prompt = prompt
        chosen = [selector.choose(asked, endpoints) for selector, _ in sides]
        assert chosen[0] == chosen[1]
        assert chosen[0] is not None
        for (selector, _), flown in zip(sides, flights, strict=True):
            _send(selector, asked, chosen[0], fate, flown)


def _send(
    selector: Selector, asked: RequestContext, chosen: Candidate, fate: str, flown: list[Flight]
) -> None:
    flight = selector.send(asked, chosen)
    if fate != "stay":
        flight.first_byte()
    if fate == "close":
        flight.close()
    else:
        flown.append(flight)
    if len(flown) > 30:
        flown.pop(0).close()


def _stats(
    of: Endpoint, told: tuple[int | None, int | None, float | None, float], clock: _Clock
) -> stats_pb2.EngineStats:
    running, waiting, kv, age = told
    stats = stats_pb2.EngineStats(replica=of.replica, incarnation=of.incarnation)
    stats.sample_time.CopyFrom(to_timestamp(clock.now()))
    stats.sample_time.seconds -= int(age)
    # Small, so that what is remembered is not all in the cache.
    stats.kv_cache_tokens, stats.kv_block_tokens = 64 * 5, 16
    if running is not None:
        stats.running_requests = running
    if waiting is not None:
        stats.waiting_requests = waiting
    if kv is not None:
        stats.kv_usage_ratio = kv
    return stats
