"""Measures the memory of the prefix index at a million blocks; `pick_cost` measures its time.

python -m tests.bench.prefix_index
"""

import random
import tracemalloc

from router.prefix.index import PrefixIndex
from router.view.view import Endpoint, EndpointState

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


def main() -> None:
    """Prints the table."""
    _memory()


if __name__ == "__main__":
    main()
