"""Compares picking strategies on simulated engines in virtual time: hit rate, first token, spread.

    python -m tests.bench.router_trace [--trace FILE] [--rate 45] [--strategies A B] [--routers 2]

In come a trace (Mooncake's format) or a generated load; out goes a Markdown table. The picking code is the
router's own (`Selector`), the engines are the simulator's `EngineModel`, and time is a number, so that a
minute of eight engines takes seconds and every run gives the same figures. There is no network: what the
router adds by itself is not in here.
"""

import argparse
import heapq
import itertools
import json
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path

from millrace.agent.v1 import node_agent_service_pb2 as messages
from millrace.core.v1 import stats_pb2

from core.block_hash import event_hash
from core.clock import to_timestamp
from nodeagent.engines.simulator.engine_model import EngineModel, SequenceRequest, Step
from nodeagent.engines.simulator.engine_model import Sequence as EngineSequence
from nodeagent.engines.simulator.kv_journal import BlockRemoved, BlocksStored, KvEvent
from nodeagent.engines.simulator.settings import EngineLimits, StepTiming
from router.picking.contract import RequestContext
from router.picking.registry import build_strategy, installed_plugins
from router.picking.selector import Flight, Selector
from router.prefix.exact.copy import CacheCopy
from router.prefix.exact.index import ExactIndex
from router.prefix.exact.tokens import hashed
from router.upstream.loads import LoadTable
from router.view.samples import SampleTable
from router.view.view import Endpoint, EndpointState
from tests.bench.published_policies import POLICIES

SEED = 20_240_817
BLOCK_TOKENS = 16
# A block of the trace has 512 tokens; scaled by eight, a minute of it fits small engines.
TRACE_BLOCK_TOKENS = 64
TRACE_SCALE = 512 // TRACE_BLOCK_TOKENS
SAMPLE_SECONDS = 1.0
# From an engine's step to a router's copy of its cache.
EVENT_SECONDS = 0.02
MODEL_LENGTH_TOKENS = 32_768


@dataclass(frozen=True, slots=True)
class Load:
    """One request: its prompt as block ids of `TRACE_BLOCK_TOKENS` tokens, cut to its length."""

    arrival_seconds: float
    block_ids: Sequence[int]
    prompt_tokens: int
    output_tokens: int


class VirtualClock:
    """Time that the event loop of this module sets."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def now(self) -> datetime:
        return datetime(2030, 1, 1, tzinfo=UTC) + timedelta(seconds=self.seconds)

    def monotonic(self) -> float:
        return self.seconds

    async def sleep(self, seconds: float) -> None:
        raise NotImplementedError(f"nothing sleeps in virtual time ({seconds} s)")


def arrivals(rate: float, generator: random.Random) -> Iterator[float]:
    """Yields the times of a Poisson process."""
    now = 0.0
    while True:
        now += generator.expovariate(rate)
        yield now


def read_trace(path: Path, *, limit: int, rate: float) -> list[Load]:
    """Reads a trace in Mooncake's format, in its order, at a rate of ours."""
    loads = []
    times = arrivals(rate, random.Random(SEED))
    with path.open(encoding="utf-8") as lines:
        for line in itertools.islice(lines, limit):
            entry = json.loads(line)
            loads.append(
                Load(
                    arrival_seconds=next(times),
                    block_ids=entry["hash_ids"],
                    prompt_tokens=max(1, entry["input_length"] // TRACE_SCALE),
                    output_tokens=max(1, entry["output_length"] // TRACE_SCALE),
                )
            )
    return loads


def shared_prefix(*, limit: int, rate: float, groups: int = 24) -> list[Load]:
    """Makes prompts that share one of some system prompts of 1,024 tokens, and 256 tokens of their own."""
    generator = random.Random(SEED)
    times, own = arrivals(rate, generator), itertools.count(1_000_000)
    return [
        Load(
            next(times),
            [
                *range(100 * (group := generator.randrange(groups)), 100 * group + 16),
                *itertools.islice(own, 4),
            ],
            20 * TRACE_BLOCK_TOKENS,
            generator.randrange(16, 64),
        )
        for _ in range(limit)
    ]


def one_prefix(*, limit: int, rate: float) -> list[Load]:
    """Makes prompts that all share 1,024 tokens and have 64 of their own."""
    generator = random.Random(SEED)
    times = arrivals(rate, generator)
    return [
        Load(
            next(times),
            [*range(16), 1_000_000 + number],
            17 * TRACE_BLOCK_TOKENS,
            generator.randrange(16, 64),
        )
        for number in range(limit)
    ]


def multi_turn(*, limit: int, rate: float, chats: int = 240, turns: int = 5) -> list[Load]:
    """Makes chats that grow by 192 tokens a turn behind one of 24 system prompts of 512 tokens."""
    generator = random.Random(SEED)
    times, own = arrivals(rate, generator), itertools.count(1_000_000)
    live: list[list[int]] = []
    ages: list[int] = []
    loads = []
    for _ in range(limit):
        if len(live) < chats:
            group = generator.randrange(24)
            live.append(list(range(100 * group, 100 * group + 8)))
            ages.append(0)
            at = len(live) - 1
        else:
            at = generator.randrange(chats)
        live[at] = [*live[at], *itertools.islice(own, 3)]
        ages[at] += 1
        loads.append(
            Load(next(times), live[at], len(live[at]) * TRACE_BLOCK_TOKENS, generator.randrange(16, 96))
        )
        if ages[at] == turns:
            live.pop(at)
            ages.pop(at)
    return loads


def random_prompts(*, limit: int, rate: float) -> list[Load]:
    """Makes prompts of 64 to 4,096 tokens that share nothing."""
    generator = random.Random(SEED)
    times, own = arrivals(rate, generator), itertools.count(1_000_000)
    return [
        Load(
            next(times),
            list(itertools.islice(own, blocks := int(2 ** generator.uniform(0, 6)))),
            blocks * TRACE_BLOCK_TOKENS,
            generator.randrange(8, 64),
        )
        for _ in range(limit)
    ]


GENERATORS: dict[str, Callable[..., list[Load]]] = {
    "shared-prefix": shared_prefix,
    "one-prefix": one_prefix,
    "multi-turn": multi_turn,
    "random": random_prompts,
}


def ideal_hit_rate(loads: Sequence[Load]) -> float:
    """Returns the share of prompt tokens that one endless cache would hit."""
    seen: set[int] = set()
    hit = total = 0
    for load in loads:
        matched = 0
        for block in load.block_ids:
            if block not in seen:
                break
            matched += 1
        hit += min(matched * TRACE_BLOCK_TOKENS, (load.prompt_tokens - 1) // BLOCK_TOKENS * BLOCK_TOKENS)
        total += load.prompt_tokens
        seen.update(load.block_ids)
    return hit / total


@dataclass
class Result:
    """What one run brought; times in seconds."""

    strategy: str
    first_token: list[float] = field(default_factory=list)
    end_to_end: list[float] = field(default_factory=list)
    hit_tokens: int = 0
    prompt_tokens: int = 0
    tokens_at: list[int] = field(default_factory=list)
    preemptions: int = 0
    wall_seconds: float = 0.0

    @property
    def hit_rate(self) -> float:
        return self.hit_tokens / self.prompt_tokens

    @property
    def spread(self) -> float:
        """Tokens at the busiest engine over the mean."""
        return max(self.tokens_at) / statistics.mean(self.tokens_at)


def percentile(values: Sequence[float], share: float) -> float:
    """Returns the value below which a share of the values lies."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


@dataclass(slots=True)
class _Engine:
    model: EngineModel
    endpoint: Endpoint
    busy: bool = False
    running: dict[EngineSequence, tuple[Load, Flight]] = field(default_factory=dict)


@dataclass(slots=True)
class _Router:
    selector: Selector
    loads: LoadTable
    samples: SampleTable


def _empty_copy(incarnation: str) -> CacheCopy:
    copy = CacheCopy()
    part = messages.KvSnapshotPart()
    end = messages.KvSnapshotEnd(
        incarnation=incarnation,
        block_tokens=BLOCK_TOKENS,
        hash_scheme=messages.KV_HASH_SCHEME_SHA256_PICKLE,
        complete=True,
    )
    copy.apply(messages.StreamKvEventsResponse(epoch="e", snapshot_part=part), 0.0)
    copy.apply(messages.StreamKvEventsResponse(epoch="e", snapshot_end=end), 0.0)
    return copy


class Simulation:
    """Routers and engines in virtual time."""

    def __init__(
        self,
        *,
        strategy: str,
        engines: int,
        blocks: int,
        routers: int,
        timing: StepTiming,
        exact: bool = False,
    ) -> None:
        self._clock = VirtualClock()
        self._order = itertools.count()
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._strategy = strategy
        self._engines = [
            _Engine(
                EngineModel(
                    EngineLimits(
                        max_model_length_tokens=min(MODEL_LENGTH_TOKENS, (blocks - 1) * BLOCK_TOKENS),
                        block_size_tokens=BLOCK_TOKENS,
                        block_count=blocks,
                        kv_events=exact,
                    ),
                    timing,
                ),
                Endpoint(
                    "a", "d", f"engine-{n}", "http://e", "d", "m", EndpointState.READY, "i", 1, f"node-{n}"
                ),
            )
            for n in range(engines)
        ]
        self._endpoints = [each.endpoint for each in self._engines]
        self._by_replica = {each.endpoint.replica: each for each in self._engines}
        self._blocks = blocks
        self._routers = []
        for _ in range(routers):
            loads, samples = LoadTable(), SampleTable(self._clock)
            built = build_strategy(strategy, {**installed_plugins(), **POLICIES})
            selector = Selector(
                built,
                loads=loads,
                samples=samples,
                exact=ExactIndex(token="", tls=None, clock=self._clock) if exact else None,
            )
            if selector.exact is not None:
                for each in self._endpoints:
                    selector.exact.follower._copies[each.replica] = _empty_copy(each.incarnation)
            self._routers.append(_Router(selector, loads, samples))
        self._result = Result(strategy, tokens_at=[0] * engines)
        self._left = 0

    def run(self, requests: Sequence[Load]) -> Result:
        """Sends all requests and waits for the last answer."""
        began = time.perf_counter()
        chooser = random.Random(SEED)
        self._left = len(requests)
        for engine in self._engines:
            self._at(0.0, partial(self._sample, engine))
        for number, request in enumerate(requests):
            router = chooser.choice(self._routers)
            self._at(
                request.arrival_seconds,
                partial(self._arrive, number, request, router),
            )
        while self._left:
            self._clock.seconds, _, action = heapq.heappop(self._events)
            action()
        self._result.wall_seconds = time.perf_counter() - began
        self._result.preemptions = sum(each.model.counters.preemptions for each in self._engines)
        return self._result

    def _at(self, seconds: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._events, (seconds, next(self._order), action))

    def _sample(self, engine: _Engine) -> None:
        stats = stats_pb2.EngineStats(
            replica=engine.endpoint.replica,
            incarnation=engine.endpoint.incarnation,
            sample_time=to_timestamp(self._clock.now()),
            running_requests=engine.model.running_count,
            waiting_requests=engine.model.waiting_count,
            kv_usage_ratio=engine.model.pool.usage_fraction,
            kv_cache_tokens=(self._blocks - 1) * BLOCK_TOKENS,
            kv_block_tokens=BLOCK_TOKENS,
        )
        for router in self._routers:
            router.samples.record(stats, own_in_flight=router.loads.take_peak(engine.endpoint.replica))
        self._at(self._clock.seconds + SAMPLE_SECONDS, partial(self._sample, engine))

    def _arrive(self, number: int, load: Load, router: _Router) -> None:
        # Four characters for a token, so that blocks of text are blocks of tokens.
        text = "".join(f"{block:>8}" * (TRACE_BLOCK_TOKENS // 2) for block in load.block_ids)
        document = {"prompt": text[: load.prompt_tokens * 4]}
        context = RequestContext(
            request_id=str(number),
            route="/v1/completions",
            namespace="a",
            deployment="d",
            model="d",
            stream=True,
            body=b"",
            prompt=router.selector.read_prompt(document, self._endpoints, namespace="a", deployment="d"),
        )
        tokens = [
            block * TRACE_BLOCK_TOKENS + at for block in load.block_ids for at in range(TRACE_BLOCK_TOKENS)
        ]
        if router.selector.exact is not None:
            context.exact = hashed(tokens[: load.prompt_tokens], (BLOCK_TOKENS,), None)
        chosen = router.selector.choose(context, self._endpoints)
        assert chosen is not None
        flight = router.selector.send(context, chosen)
        engine = self._by_replica[chosen.endpoint.replica]
        sequence = engine.model.submit(
            SequenceRequest(
                tokens[: load.prompt_tokens],
                load.output_tokens,
                "length",
                lambda index: -1 - (number << 16) - index,
            ),
            self._clock.seconds,
        )
        engine.running[sequence] = (load, flight)
        if not engine.busy:
            self._step(engine)

    def _tell(self, engine: _Engine, events: Sequence[KvEvent]) -> None:
        """Brings an engine's KV events to every router."""
        for router in self._routers:
            assert router.selector.exact is not None
            copy = router.selector.exact.follower.copies[engine.endpoint.replica]
            for event in events:
                stored = event.digests if isinstance(event, BlocksStored) else ()
                removed = (event.digest,) if isinstance(event, BlockRemoved) else ()
                change = messages.KvChange(
                    removed_block_hashes=map(event_hash, removed), stored_block_hashes=map(event_hash, stored)
                )
                message = messages.StreamKvEventsResponse(
                    epoch=copy.epoch, sequence=copy.sequence + 1, change=change
                )
                copy.apply(message, self._clock.seconds)

    def _step(self, engine: _Engine) -> None:
        step = engine.model.begin_step(self._clock.seconds)
        engine.busy = step is not None
        if step is not None:
            self._at(self._clock.seconds + step.duration_seconds, partial(self._finish, engine, step))

    def _finish(self, engine: _Engine, step: Step) -> None:
        outcome = engine.model.finish_step(step, self._clock.seconds)
        events = engine.model.journal.take()
        if events:
            self._at(self._clock.seconds + EVENT_SECONDS, partial(self._tell, engine, events))
        for emission in outcome.emissions:
            if emission.is_first:
                load, flight = engine.running[emission.sequence]
                flight.first_byte()
                self._result.first_token.append(self._clock.seconds - load.arrival_seconds)
        for sequence in outcome.finished:
            load, flight = engine.running.pop(sequence)
            flight.close()
            self._result.end_to_end.append(self._clock.seconds - load.arrival_seconds)
            self._result.hit_tokens += sequence.cached_tokens
            self._result.prompt_tokens += load.prompt_tokens
            self._result.tokens_at[self._engines.index(engine)] += load.prompt_tokens + load.output_tokens
            self._left -= 1
        self._step(engine)


def row(result: Result, ideal: float) -> str:
    """Renders a result."""
    first = [percentile(result.first_token, share) * 1000 for share in (0.5, 0.9, 0.99)]
    whole = [percentile(result.end_to_end, share) * 1000 for share in (0.5, 0.9, 0.99)]
    of_ideal = f"{result.hit_rate / ideal:.2f}" if ideal else "-"
    return (
        f"| {result.strategy} | {result.hit_rate:.3f} | {of_ideal} "
        f"| {first[0]:.0f} / {first[1]:.0f} / {first[2]:.0f} "
        f"| {whole[0]:.0f} / {whole[1]:.0f} / {whole[2]:.0f} | {result.spread:.2f} |"
    )


STRATEGIES = (
    "round-robin",
    "random",
    "least-pending",
    "least-queue",
    "least-kv-cache",
    "prefix-aware",
    "prefix=3,kv=2,load=2",
    *POLICIES,
    "default",
)


def main() -> None:
    """Runs every strategy on one load and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--trace", type=Path, help="a trace in Mooncake's format; default: a generated load")
    parser.add_argument("--load", choices=sorted(GENERATORS), default="multi-turn")
    parser.add_argument("--rate", type=float, default=45.0, help="requests per second")
    parser.add_argument("--requests", type=int, default=3000)
    parser.add_argument("--engines", type=int, default=8)
    parser.add_argument("--blocks", type=int, default=8000, help="KV blocks of 16 tokens of each engine")
    parser.add_argument("--prefill-rate", type=float, default=11_000.0, help="tokens per second of an engine")
    parser.add_argument("--routers", type=int, default=1)
    parser.add_argument("--exact", action="store_true", help="routers know engines' caches from KV events")
    parser.add_argument("--strategies", nargs="+", default=STRATEGIES, help="as the router takes them")
    options = parser.parse_args()
    if options.trace is None:
        loads = GENERATORS[options.load](limit=options.requests, rate=options.rate)
    else:
        loads = read_trace(options.trace, limit=options.requests, rate=options.rate)
    ideal = ideal_hit_rate(loads)
    print(
        f"\n{options.load if options.trace is None else options.trace.name}, {len(loads)} requests at "
        f"{options.rate:g}/s, {options.engines} engines of {options.blocks} blocks, "
        f"{options.routers} router(s); one endless cache would hit {ideal:.3f}\n"
    )
    print("| strategy | hit rate | of ideal | first token p50/p90/p99 ms | end p50/p90/p99 ms | spread |")
    print("|---|---|---|---|---|---|")
    for strategy in options.strategies:
        simulation = Simulation(
            strategy=strategy,
            engines=options.engines,
            blocks=options.blocks,
            routers=options.routers,
            exact=options.exact,
            timing=StepTiming(prefill_tokens_per_second=options.prefill_rate),
        )
        print(row(simulation.run(loads), ideal), flush=True)


if __name__ == "__main__":
    main()
