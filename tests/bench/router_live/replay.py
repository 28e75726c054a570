"""Replays a trace, or a generated load, on a fleet of simulated engines behind each router, in real time.

    python -m tests.bench.router_live.replay --trace FILE [--rate 45] [--requests 3000] [--routers 1 2]
    python -m tests.bench.router_live.replay --load one-prefix --targets millrace sglang-router

In: requests with arrival times (`tests.bench.router_loads` reads and makes them). Out: a Markdown table. Open
loop: a request leaves at its time, whatever became of those before. Every target has a fresh fleet of
`millrace-simulator` (eight engines in one process), so that no cache is warm from the target before it, and
the hit rate is what the engines themselves counted. Prompts are made so that a token of the simulator is four
characters and a block of the trace is 64 tokens.
Must not: scale time. A simulated token costs some 80 us of processor, so 45 requests/s with 43 tokens each
take a sixth of a core; what the fleet really took, and how late requests left, is printed.
"""

import argparse
import asyncio
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import orjson

from core.settings import event_loop_runner
from nodeagent.engines.metrics_text import VLLM_NAMES, parse_stats
from tests.bench.router_live.native import Unavailable
from tests.bench.router_live.processes import Cores, Pinned, pinned, wait_answering
from tests.bench.router_live.targets import TARGETS, Site, Target, open_targets
from tests.bench.router_loads import (
    BLOCK_TOKENS,
    GENERATORS,
    SEED,
    TRACE_BLOCK_TOKENS,
    Load,
    ideal_hit_rate,
    read_trace,
)
from tests.bench.router_trace import percentile
from tests.support.ports import consecutive_ports

REFERENCE = "sglang-router"
REPLAY_TARGETS = ("sglang-router", "sglang-round-robin", "millrace")
# A request that takes longer is a failure; the longest at overload end within a minute.
_ANSWER_SECONDS_MAX = 180.0


@dataclass
class Outcome:
    """What came of all requests at one target; times in seconds."""

    first_token: list[float] = field(default_factory=list)
    end_to_end: list[float] = field(default_factory=list)
    lateness: list[float] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Fleet:
    """Simulated engines in one process."""

    urls: list[str]
    process: Pinned


@dataclass(frozen=True)
class Row:
    """A line of the table."""

    name: str
    outcome: Outcome
    hit_rate: float
    spread: float
    preemptions: int
    engine_core: float

    def first_ms(self, share: float) -> float:
        return percentile(self.outcome.first_token, share) * 1000

    def end_ms(self, share: float) -> float:
        return percentile(self.outcome.end_to_end, share) * 1000


@asynccontextmanager
async def fleet(site: Site, *, engines: int, blocks: int, prefill_rate: float) -> AsyncIterator[Fleet]:
    """Runs simulated engines with cold caches on the load's core."""
    first = consecutive_ports(engines)
    command = [
        str(Path(sys.executable).parent / "millrace-simulator"),
        *("--model", "bench", "--served-model-name", site.model, "--host", "127.0.0.1"),
        *("--port", str(first), "--fleet", str(engines), "--block-size", str(BLOCK_TOKENS)),
        *("--num-gpu-blocks-override", str(blocks), "--prefill-tokens-per-second", str(prefill_rate)),
    ]
    urls = [f"http://127.0.0.1:{first + number}" for number in range(engines)]
    async with pinned(command, cores=site.cores.load, log=site.directory / "fleet.log") as process:
        for url in urls:
            await wait_answering(process, f"{url}/health")
        yield Fleet(urls, process)


def _word(number: int) -> str:
    """Two tokens for a block's id: a space and three letters each; ids below 26**6 differ."""
    letters = []
    for _ in range(6):
        number, digit = divmod(number, 26)
        letters.append(chr(ord("a") + digit))
    return f" {''.join(letters[:3])} {''.join(letters[3:])}"


def prompt_of(load: Load) -> str:
    """Makes the text of a prompt: four characters a token, so that blocks of text are blocks of tokens."""
    text = "".join(_word(block) * (TRACE_BLOCK_TOKENS // 2) for block in load.block_ids)
    return text[: load.prompt_tokens * 4]


class Replayer:
    """Sends requests at their times to one router or several."""

    def __init__(self, targets: Sequence[Target], model: str) -> None:
        self._targets = targets
        self._model = model
        self._outcome = Outcome()

    async def run(self, loads: Sequence[Load]) -> Outcome:
        chooser = random.Random(SEED)
        timeout = aiohttp.ClientTimeout(total=_ANSWER_SECONDS_MAX)
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(timeout=timeout, connector=connector, trust_env=False) as session:
            began = time.perf_counter()
            async with asyncio.TaskGroup() as group:
                for number, load in enumerate(loads):
                    due = began + load.arrival_seconds
                    await asyncio.sleep(max(0.0, due - time.perf_counter()))
                    target = chooser.choice(self._targets)
                    group.create_task(self._send(session, target, load, due), name=f"request-{number}")
        return self._outcome

    async def _send(self, session: aiohttp.ClientSession, target: Target, load: Load, due: float) -> None:
        body = orjson.dumps(
            {
                "model": self._model,
                "prompt": prompt_of(load),
                "max_tokens": load.output_tokens,
                "ignore_eos": True,
                "stream": True,
            }
        )
        headers = {"authorization": f"Bearer {target.key}", "content-type": "application/json"}
        sent = time.perf_counter()
        self._outcome.lateness.append(sent - due)
        first, tail = 0.0, b""
        try:
            async with session.post(f"{target.url}/v1/completions", data=body, headers=headers) as answer:
                async for piece in answer.content.iter_any():
                    first = first or time.perf_counter()
                    tail = (tail + piece)[-4096:]
                status = answer.status
        except (aiohttp.ClientError, TimeoutError) as error:
            self._outcome.failures.append(repr(error))
            return
        if status != 200 or b"data: [DONE]" not in tail or b'"error"' in tail:
            self._outcome.failures.append(f"{status}: {tail[-200:]!r}")
            return
        self._outcome.first_token.append(first - sent)
        self._outcome.end_to_end.append(time.perf_counter() - sent)


async def _counters(urls: Sequence[str]) -> tuple[float, float, int]:
    """Returns the hit rate, the busiest engine's tokens over the mean, and the preemptions of a fleet."""
    async with aiohttp.ClientSession(trust_env=False) as session:
        pages = []
        for url in urls:
            async with session.get(f"{url}/metrics") as answer:
                pages.append(parse_stats(await answer.text(), VLLM_NAMES))
    hits = sum(each.prefix_hit_tokens_total for each in pages)
    queries = sum(each.prefix_query_tokens_total for each in pages)
    tokens = [each.prompt_tokens_total + each.generation_tokens_total for each in pages]
    return (
        hits / queries,
        max(tokens) / statistics.mean(tokens),
        sum(each.preemptions_total for each in pages),
    )


async def replay_one(
    options: argparse.Namespace, site: Site, name: str, routers: int, loads: Sequence[Load]
) -> Row:
    """Replays the load on a fresh fleet behind one kind of router.

    Raises:
        Unavailable: The fleet or the router did not start.
    """
    async with AsyncExitStack() as stack:
        engines = await stack.enter_async_context(
            fleet(site, engines=options.engines, blocks=options.blocks, prefill_rate=options.prefill_rate)
        )
        targets = await stack.enter_async_context(open_targets(name, site, engines.urls, routers))
        # The first samples reach a router a second after its start, as they have long before a user's load.
        await asyncio.sleep(1.5)
        before, began = engines.process.cpu_seconds(), time.perf_counter()
        outcome = await Replayer(targets, site.model).run(loads)
        engine_core = (engines.process.cpu_seconds() - before) / (time.perf_counter() - began)
        hit_rate, spread, preemptions = await _counters(engines.urls)
        title = targets[0].name if routers == 1 else f"{targets[0].name}, {routers} routers"
        return Row(title, outcome, hit_rate, spread, preemptions, engine_core)


def _cells(row: Row, ideal: float, reference: Row | None) -> str:
    first = [row.first_ms(share) for share in (0.5, 0.9, 0.99)]
    end = [row.end_ms(share) for share in (0.5, 0.9, 0.99)]
    ratios = "-"
    if reference is not None:
        shares = [
            row.first_ms(share) / reference.first_ms(share) if reference.outcome.first_token else 0.0
            for share in (0.5, 0.9, 0.99)
        ]
        ratios = f"{row.hit_rate / reference.hit_rate:.2f}; " + " / ".join(f"{each:.2f}" for each in shares)
    late_ms = percentile(row.outcome.lateness, 0.99) * 1000
    return (
        f"| {row.name} | {row.hit_rate:.3f} | {row.hit_rate / ideal if ideal else 0:.2f} "
        f"| {first[0]:.0f} / {first[1]:.0f} / {first[2]:.0f} | {ratios} "
        f"| {end[0]:.0f} / {end[1]:.0f} / {end[2]:.0f} | {row.spread:.2f} | {row.preemptions} "
        f"| {len(row.outcome.failures)} | {row.engine_core:.0%}, {late_ms:.0f} ms |"
    )


async def _replay_all(options: argparse.Namespace, site: Site, loads: Sequence[Load]) -> None:
    ideal = ideal_hit_rate(loads)
    source = options.trace.name if options.trace else options.load
    print(
        f"\n(d) {source}, {len(loads)} requests at {options.rate:g}/s, {options.engines} engines of "
        f"{options.blocks} blocks of {BLOCK_TOKENS} tokens; one endless cache would hit {ideal:.3f}\n"
    )
    print(
        "| target | hit rate | of ideal | first token p50/p90/p99 ms | to sglang-router's: hits; first token "
        "| end p50/p90/p99 ms | spread | preemptions | failed | fleet's core, lateness p99 |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|", flush=True)
    references: dict[int, Row] = {}
    for routers in options.routers:
        for name in options.targets:
            try:
                row = await replay_one(options, site, name, routers, loads)
            except Unavailable as reason:
                print(f"| {name} | {reason} |" + " |" * 8, flush=True)
                continue
            if name == REFERENCE:
                references[routers] = row
            print(_cells(row, ideal, references.get(routers)), flush=True)
            for failure in row.outcome.failures[:3]:
                print(f"{name}: {failure}", file=sys.stderr)


def main() -> None:
    """Replays one load on all targets and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--trace", type=Path, help="a trace in Mooncake's format; default: a generated load")
    parser.add_argument("--load", choices=sorted(GENERATORS), default="multi-turn")
    parser.add_argument("--rate", type=float, default=45.0, help="requests per second")
    parser.add_argument("--requests", type=int, default=3000)
    parser.add_argument("--engines", type=int, default=8)
    parser.add_argument("--blocks", type=int, default=8000, help="KV blocks of 16 tokens of each engine")
    parser.add_argument("--prefill-rate", type=float, default=11_000.0, help="tokens per second of an engine")
    parser.add_argument(
        "--routers", type=int, nargs="+", default=[1], help="side by side; several: one by one"
    )
    parser.add_argument("--targets", nargs="+", choices=sorted(TARGETS), default=REPLAY_TARGETS)
    options = parser.parse_args()
    if options.trace is None:
        loads = GENERATORS[options.load](limit=options.requests, rate=options.rate)
    else:
        loads = read_trace(options.trace, limit=options.requests, rate=options.rate)
    cores = Cores.of_this_machine()
    os.sched_setaffinity(0, {int(core) for core in cores.load.split(",")})
    with tempfile.TemporaryDirectory(prefix="millrace-bench-") as directory, event_loop_runner() as runner:
        runner.run(_replay_all(options, Site(Path(directory), cores), loads))


if __name__ == "__main__":
    main()
