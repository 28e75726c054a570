"""Measures the prefix index: memory of a million blocks, and the CPU that one request costs.

python -m tests.bench.prefix_index
"""

import random
import statistics
import time
import tracemalloc
from collections.abc import Callable
from functools import partial

import orjson

from router.openai.body import parse_body
from router.picking.contract import Candidate, RequestContext
from router.picking.registry import build_strategy
from router.picking.selector import Selector
from router.prefix.index import PrefixIndex
from router.upstream.loads import LoadTable
from router.view.samples import SampleTable
from router.view.view import Endpoint, EndpointState
from tests.support.clock import ManualClock

BLOCKS = 1_000_000
CHAIN_BLOCKS = 100
ENDPOINTS = [
    Endpoint("a", "d", f"engine-{n}", "http://e", "d", "m", EndpointState.READY, "i", 1, "n")
    for n in range(8)
]


def _memory() -> None:
    print(f"\nMemory of the prefix index, chains of {CHAIN_BLOCKS} blocks, 8 endpoints\n")
    print("| blocks | bytes a block | MiB |")
    print("|---|---|---|")
    generator = random.Random(1)
    tracemalloc.start()
    before, _ = tracemalloc.get_traced_memory()
    index = PrefixIndex(bytes_max=1 << 40)
    for number in range(BLOCKS // CHAIN_BLOCKS):
        chain = [generator.getrandbits(64) for _ in range(CHAIN_BLOCKS)]
        index.record(ENDPOINTS[number % 8].identity, chain, capacity_blocks=BLOCKS)
    taken = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    print(f"| {len(index):,} | {taken / len(index):.0f} | {taken / 2**20:.0f} |")


def _microseconds(action: Callable[[], object], rounds: int = 2000) -> float:
    """Returns the median of some rounds."""
    taken = []
    for _ in range(rounds):
        began = time.perf_counter_ns()
        action()
        taken.append(time.perf_counter_ns() - began)
    return statistics.median(taken) / 1000


def _send(selector: Selector, context: RequestContext, chosen: Candidate) -> None:
    selector.send(context, chosen).close()


def _costs() -> None:
    print("\nCPU of one request on 8 endpoints that all hold its prefix, microseconds, median\n")
    print(
        "| prompt | parse JSON | read and hash prompt | match, score, pick | count and learn | all but JSON |"
    )
    print("|---|---|---|---|---|---|")
    for length in (2_000, 40_000):
        selector = Selector(build_strategy("default"), loads=LoadTable(), samples=SampleTable(ManualClock()))
        text = "".join(random.Random(1).choices("abcdefgh ", k=length))
        body = orjson.dumps({"model": "d", "messages": [{"role": "user", "content": text}]})
        document = parse_body(body).document

        def read(selector: Selector = selector, document: object = document) -> RequestContext:
            assert isinstance(document, dict)
            prompt = selector.read_prompt(document, ENDPOINTS, namespace="a", deployment="d")
            return RequestContext("id", "/v1/chat/completions", "a", "d", "d", True, b"", prompt)

        context = read()
        for each in ENDPOINTS:
            selector.index.record(each.identity, context.prompt.chain, capacity_blocks=100_000)
        chosen = selector.choose(context, ENDPOINTS)
        assert chosen is not None
        costs = [
            _microseconds(partial(parse_body, body)),
            _microseconds(read),
            _microseconds(partial(selector.choose, context, ENDPOINTS)),
            _microseconds(partial(_send, selector, context, chosen)),
        ]
        cells = " | ".join(f"{each:.1f}" for each in (*costs, sum(costs[1:])))
        print(f"| {length / 1000:g} kB | {cells} |")


def main() -> None:
    """Prints both tables."""
    _costs()
    _memory()


if __name__ == "__main__":
    main()
