"""What routers are asked in `router_trace` and `router_live.replay`: a trace, or loads made here.

In come a file in Mooncake's format, or a name, a rate and a seed; out go requests with their arrival times.
The same seed gives the same requests. Nothing is sent here.
"""

import itertools
import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

SEED = 20_240_817
BLOCK_TOKENS = 16
# A block of the trace has 512 tokens; scaled by eight, a minute of it fits small engines.
TRACE_BLOCK_TOKENS = 64
TRACE_SCALE = 512 // TRACE_BLOCK_TOKENS


@dataclass(frozen=True, slots=True)
class Load:
    """One request: its prompt as block ids of `TRACE_BLOCK_TOKENS` tokens, cut to its length."""

    arrival_seconds: float
    block_ids: Sequence[int]
    prompt_tokens: int
    output_tokens: int


def arrivals(rate: float, generator: random.Random) -> Iterator[float]:
    """Yields the times of a Poisson process."""
    now = 0.0
    while True:
        now += generator.expovariate(rate)
        yield now


def read_trace(path: Path, *, limit: int, rate: float, seed: int = SEED) -> list[Load]:
    """Reads a trace in Mooncake's format, in its order, at a rate of ours."""
    loads = []
    times = arrivals(rate, random.Random(seed))
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


def shared_prefix(*, limit: int, rate: float, groups: int = 24, seed: int = SEED) -> list[Load]:
    """Makes prompts that share one of some system prompts of 1,024 tokens, and 256 tokens of their own."""
    generator = random.Random(seed)
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


def one_prefix(*, limit: int, rate: float, seed: int = SEED) -> list[Load]:
    """Makes prompts that all share 1,024 tokens and have 64 of their own."""
    generator = random.Random(seed)
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


def multi_turn(*, limit: int, rate: float, chats: int = 240, turns: int = 5, seed: int = SEED) -> list[Load]:
    """Makes chats that grow by 192 tokens a turn behind one of 24 system prompts of 512 tokens."""
    generator = random.Random(seed)
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


def random_prompts(*, limit: int, rate: float, seed: int = SEED) -> list[Load]:
    """Makes prompts of 64 to 4,096 tokens that share nothing."""
    generator = random.Random(seed)
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
