"""Measures what a request costs the router besides moving its bytes: parse, hash, pick, count and learn.

    python -m tests.bench.pick_cost [--strategy default] [--rounds 3000] [--room]
    PYTHONPATH=.millrace/native:. python -P -m tests.bench.pick_cost        what is compiled

Out goes a Markdown table in microseconds. Each figure is the least of several means, so that other work on
the machine shows as little as can be. `new` prompts share nothing with any before; `turn` is the next turn of
a conversation that one endpoint holds all but the last kilobyte of; `common` is one prompt that all hold.
`read to end` is all but parsing and eligibility, as one request after the other does it, with some in flight:
read the prompt, make the context, choose, send, first byte, close.
"""

import argparse
import gc
import itertools
import random
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import orjson
from millrace.core.v1 import stats_pb2

from core.clock import to_timestamp
from router.openai.body import parse_body
from router.picking.contract import RequestContext
from router.picking.eligibility import eligible
from router.picking.registry import build_strategy
from router.picking.selector import Flight, Selector
from router.prefix.index import REMEMBERED
from router.upstream.health import EndpointHealth
from router.upstream.loads import LoadTable
from router.view.samples import SampleTable
from router.view.view import Endpoint, EndpointState
from tests.support.clock import ManualClock

SHARES = 30
SIZES = (2_000, 8_000, 48_000)
CACHE_BLOCKS, CHAIN_BLOCKS = 1_000, 10
CASES = ("new", "turn", "common")
# Requests in flight while one is measured.
IN_FLIGHT = 16


@dataclass(slots=True)
class Bench:
    """A router's picking half, with endpoints that have told of themselves."""

    selector: Selector
    endpoints: tuple[Endpoint, ...]
    health: EndpointHealth
    capacity_blocks: int

    def read(self, body: bytes) -> RequestContext:
        document = parse_body(body).document
        prompt = self.selector.read_prompt(document, self.endpoints, namespace="a", deployment="d")
        return RequestContext("id", "/v1/chat/completions", "a", "d", "d", True, body, prompt)

    def usable(self) -> Sequence[Endpoint]:
        return eligible(
            self.endpoints,
            tried=(),
            is_ejected=self.health.is_ejected,
            last_failure_seconds=self.health.last_failure_seconds,
        )


def make_bench(count: int, strategy: str, *, room: bool) -> Bench:
    """Builds a selector over endpoints with a fresh sample each; with room, nothing is pushed out."""
    capacity = CACHE_BLOCKS * (10_000 if room else 1)
    clock, loads = ManualClock(), LoadTable()
    samples = SampleTable(clock)
    endpoints = tuple(
        Endpoint("a", "d", f"engine-{n:03}", "http://e", "d", "m", EndpointState.READY, "i", 1, "n")
        for n in range(count)
    )
    for each in endpoints:
        samples.record(
            stats_pb2.EngineStats(
                replica=each.replica,
                incarnation=each.incarnation,
                sample_time=to_timestamp(clock.now()),
                running_requests=4,
                waiting_requests=0,
                kv_usage_ratio=0.4,
                kv_cache_tokens=64 * capacity,
                kv_block_tokens=16,
            ),
            own_in_flight=4,
        )
    selector = Selector(build_strategy(strategy), loads=loads, samples=samples)
    generator = random.Random(1)
    # Caches are full in real life: everything that is learned pushes something out.
    for each in endpoints:
        for _ in range(REMEMBERED * CACHE_BLOCKS // CHAIN_BLOCKS):
            chain = [generator.getrandbits(64) for _ in range(CHAIN_BLOCKS)]
            selector.index.record(each.identity, chain, capacity_blocks=capacity)
    return Bench(selector, endpoints, EndpointHealth(clock), capacity)


def body_of(text: str) -> bytes:
    """Makes a request of a system prompt and one message."""
    messages = [{"role": "system", "content": text[:500]}, {"role": "user", "content": text[500:]}]
    return orjson.dumps({"model": "d", "messages": messages, "stream": True, "max_tokens": 64})


def prompts(case: str, size: int, count: int) -> list[bytes]:
    """Makes the bodies of one case."""
    generator = random.Random(size)
    common = "".join(generator.choices("abcdefgh ", k=size))
    if case == "common":
        return [body_of(common)] * count
    if case == "turn":
        return [body_of(f"{common[:-1000]}{number:<1000}") for number in range(count)]
    return [body_of(f"{number:<16}{common[16:]}") for number in range(count)]


def least_microseconds(action: Callable[[int], object], rounds: int) -> float:
    """Returns the least of several means; the action gets a number that never comes again."""
    numbers, found = itertools.count(), []
    gc.collect()
    gc.disable()
    for _ in range(SHARES):
        part = [next(numbers) for _ in range(rounds // SHARES)]
        began = time.perf_counter_ns()
        for number in part:
            action(number)
        found.append((time.perf_counter_ns() - began) / len(part) / 1000)
    gc.enable()
    return min(found)


def measure(bench: Bench, case: str, size: int, rounds: int) -> list[float]:
    """Returns the cost of each step of a request, in microseconds."""
    # The second half is for whole requests, whose prompts have to be as new as the others were.
    bodies = prompts(case, size, 2 * rounds)
    contexts = [bench.read(body) for body in bodies[:rounds]]
    if case != "new":
        holders = bench.endpoints[:1] if case == "turn" else bench.endpoints
        for each in holders:
            bench.selector.index.record(
                each.identity, contexts[0].prompt.chain, capacity_blocks=bench.capacity_blocks
            )
    documents = [parse_body(body).document for body in bodies]

    def choose_and_send(number: int) -> None:
        chosen = bench.selector.choose(contexts[number], bench.usable())
        assert chosen is not None
        with bench.selector.send(contexts[number], chosen) as flight:
            flight.first_byte()

    selector, endpoints = bench.selector, bench.endpoints
    flights: deque[Flight] = deque()

    def read_to_end(number: int) -> None:
        document = documents[rounds + number]
        prompt = selector.read_prompt(document, endpoints, namespace="a", deployment="d")
        context = RequestContext("id", "/v1/chat/completions", "a", "d", "d", True, b"", prompt)
        chosen = selector.choose(context, endpoints)
        assert chosen is not None
        flight = selector.send(context, chosen)
        flight.first_byte()
        flights.append(flight)
        if len(flights) > IN_FLIGHT:
            flights.popleft().close()

    return [
        least_microseconds(lambda number: parse_body(bodies[number]), rounds),
        least_microseconds(
            lambda number: selector.read_prompt(documents[number], endpoints, namespace="a", deployment="d"),
            rounds,
        ),
        least_microseconds(lambda _: bench.usable(), rounds),
        least_microseconds(lambda number: selector.choose(contexts[number], endpoints), rounds),
        least_microseconds(choose_and_send, rounds),
        least_microseconds(read_to_end, rounds),
    ]


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--strategy", default="default")
    parser.add_argument("--rounds", type=int, default=3000)
    parser.add_argument("--endpoints", type=int, nargs="+", default=(8, 64))
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="bytes of a prompt")
    parser.add_argument("--room", action="store_true", help="caches that nothing is pushed out of")
    options = parser.parse_args()
    print(f"\nCPU of one request, strategy `{options.strategy}`, microseconds\n")
    columns = "parse | read prompt | eligible | choose | eligible to end | read to end"
    print(f"| endpoints | prompt | case | {columns} |")
    print("|---|---|---|---|---|---|---|---|---|")
    for count, size, case in itertools.product(options.endpoints, options.sizes, CASES):
        bench = make_bench(count, options.strategy, room=options.room)
        cells = " | ".join(f"{each:.1f}" for each in measure(bench, case, size, options.rounds))
        print(f"| {count} | {size / 1000:g} kB | {case} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
