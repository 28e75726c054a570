"""Compares picking strategies on simulated engines in virtual time: hit rate, first token, spread.

    python -m tests.bench.router_trace [--trace FILE] [--rate 45] [--strategies A B] [--routers 2]

In come a trace (Mooncake's format) or a generated load; out goes a Markdown table. The picking code is the
router's own (`Selector`), and so is what it learns of the room in engines (`EndpointLimits`); the engines are
the simulator's `EngineModel`, and time is a number, so that a minute of eight engines takes seconds and every
run gives the same figures. Who finds no room waits first come, first served. There is no network: what the
router adds by itself is not in here.
"""

import argparse
import heapq
import itertools
import random
import statistics
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

from millrace.agent.v1 import node_agent_service_pb2 as messages
from millrace.core.v1 import stats_pb2

from core.block_hash import event_hash
from core.clock import to_timestamp
from nodeagent.engines.simulator.engine_model import EngineModel, SequenceRequest, Step
from nodeagent.engines.simulator.engine_model import Sequence as EngineSequence
from nodeagent.engines.simulator.kv_journal import BlockRemoved, BlocksStored, KvEvent
from nodeagent.engines.simulator.settings import EngineLimits, StepTiming
from router.admission.saturation import EndpointLimits
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
from tests.bench.router_loads import (
    BLOCK_TOKENS,
    GENERATORS,
    SEED,
    TRACE_BLOCK_TOKENS,
    Load,
    ideal_hit_rate,
    read_trace,
)

SAMPLE_SECONDS = 1.0
# From an engine's step to a router's copy of its cache.
EVENT_SECONDS = 0.02
MODEL_LENGTH_TOKENS = 32_768


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
    limits: EndpointLimits = field(default_factory=EndpointLimits)
    line: deque[Callable[[Sequence[Endpoint]], None]] = field(default_factory=deque)


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
        timing: StepTiming | Sequence[StepTiming],
        exact: bool = False,
        block_tokens: int = BLOCK_TOKENS,
        seed: int = SEED,
    ) -> None:
        self._clock = VirtualClock()
        self._order = itertools.count()
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._strategy = strategy
        timings = [timing] * engines if isinstance(timing, StepTiming) else timing
        self._engines = [
            _Engine(
                EngineModel(
                    EngineLimits(
                        max_model_length_tokens=min(MODEL_LENGTH_TOKENS, (blocks - 1) * block_tokens),
                        block_size_tokens=block_tokens,
                        block_count=blocks,
                        kv_events=exact,
                    ),
                    each_timing,
                ),
                Endpoint(
                    "a", "d", f"engine-{n}", "http://e", "d", "m", EndpointState.READY, "i", 1, f"node-{n}"
                ),
            )
            for n, each_timing in enumerate(timings)
        ]
        self._endpoints = [each.endpoint for each in self._engines]
        self._by_replica = {each.endpoint.replica: each for each in self._engines}
        self._blocks = blocks
        self._block_tokens = block_tokens
        self._seed = seed
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
        self._left = len(requests)
        for engine in self._engines:
            self._at(0.0, partial(self._sample, engine))
        self._begin(requests)
        while self._left:
            self._clock.seconds, _, action = heapq.heappop(self._events)
            action()
        self._result.wall_seconds = time.perf_counter() - began
        self._result.preemptions = sum(each.model.counters.preemptions for each in self._engines)
        return self._result

    def _begin(self, requests: Sequence[Load]) -> None:
        chooser = random.Random(self._seed)
        for number, request in enumerate(requests):
            router = chooser.choice(self._routers)
            self._at(
                request.arrival_seconds,
                partial(self._arrive, number, request, router),
            )

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
            kv_cache_tokens=(self._blocks - 1) * self._block_tokens,
            kv_block_tokens=self._block_tokens,
        )
        replica, incarnation = engine.endpoint.identity
        for router in self._routers:
            router.samples.record(stats, own_in_flight=router.loads.take_peak(replica))
            sample = router.samples.latest(replica, incarnation)
            assert sample is not None
            router.limits.take(replica, sample, own=router.loads.in_flight(replica))
            self._let_in(router)
        self._at(self._clock.seconds + SAMPLE_SECONDS, partial(self._sample, engine))

    def _arrive(self, number: int, load: Load, router: _Router) -> None:
        # Four characters for a token, so that blocks of text are blocks of tokens.
        text = "".join(f"{block:>8}" * (TRACE_BLOCK_TOKENS // 2) for block in load.block_ids)
        tokens = [
            block * TRACE_BLOCK_TOKENS + at for block in load.block_ids for at in range(TRACE_BLOCK_TOKENS)
        ]
        self._send(
            number,
            load,
            router,
            document={"prompt": text[: load.prompt_tokens * 4]},
            tokens=tokens[: load.prompt_tokens],
            output_token=lambda index: -1 - (number << 16) - index,
        )

    def _send(
        self,
        number: int,
        load: Load,
        router: _Router,
        *,
        document: Mapping[str, Any],
        tokens: list[int],
        output_token: Callable[[int], int],
    ) -> None:
        """Puts a request at the end of the line, which nearly always is empty."""
        send = partial(
            self._give, number, load, router, document=document, tokens=tokens, output_token=output_token
        )
        router.line.append(send)
        self._let_in(router)

    def _let_in(self, router: _Router) -> None:
        """Sends those that there is room for."""
        while router.line:
            free = router.limits.free(self._endpoints, router.loads.in_flight)
            if not free:
                return
            router.line.popleft()(free)

    def _give(
        self,
        number: int,
        load: Load,
        router: _Router,
        endpoints: Sequence[Endpoint],
        *,
        document: Mapping[str, Any],
        tokens: list[int],
        output_token: Callable[[int], int],
    ) -> None:
        """Picks an engine among those with room and gives it the request."""
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
        if router.selector.exact is not None:
            context.exact = hashed(tokens, (self._block_tokens,), None)
        chosen = router.selector.choose(context, endpoints)
        assert chosen is not None
        flight = router.selector.send(context, chosen)
        engine = self._by_replica[chosen.endpoint.replica]
        sequence = engine.model.submit(
            SequenceRequest(tokens, load.output_tokens, "length", output_token), self._clock.seconds
        )
        engine.running[sequence] = (load, flight)
        if not engine.busy:
            self._step(engine)

    def _ended(self, load: Load) -> None:
        """An answer is complete; for loads that hang on answers."""

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
            self._ended(load)
            for router in self._routers:
                self._let_in(router)
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
    parser.add_argument("--seed", type=int, default=SEED, help="of arrivals and of generated loads")
    parser.add_argument("--engines", type=int, default=8)
    parser.add_argument("--blocks", type=int, default=8000, help="KV blocks of 16 tokens of each engine")
    parser.add_argument("--prefill-rate", type=float, default=11_000.0, help="tokens per second of an engine")
    parser.add_argument("--routers", type=int, default=1)
    parser.add_argument("--exact", action="store_true", help="routers know engines' caches from KV events")
    parser.add_argument("--strategies", nargs="+", default=STRATEGIES, help="as the router takes them")
    options = parser.parse_args()
    if options.trace is None:
        loads = GENERATORS[options.load](limit=options.requests, rate=options.rate, seed=options.seed)
    else:
        loads = read_trace(options.trace, limit=options.requests, rate=options.rate, seed=options.seed)
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
            seed=options.seed,
            timing=StepTiming(prefill_tokens_per_second=options.prefill_rate),
        )
        print(row(simulation.run(loads), ideal), flush=True)


if __name__ == "__main__":
    main()
