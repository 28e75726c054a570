"""Keeps a router under load for long and looks for what it does not give back: memory, sockets, tasks.

    python -m tests.bench.router_soak [--seconds 3600] [--share 0.7]

In: how long, and the share of the router's measured maximum to load it with. The load is whole answers at a
steady rate with prompts that never repeat, streams beside them, and clients that hang up in mid-stream. Out:
one Markdown table. Memory is compared between the first tenth after the warm-up and the last tenth, sockets
and tasks between before the load and some seconds after it. Exit code 1 where something was not given back.
Must not: let the prefix index grow during the measurement; engines' KV caches are small, so that it is full
before the warm-up ends.
"""

import argparse
import asyncio
import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import psutil

from core.settings import event_loop_runner
from core.tasks import cancel_and_wait
from tests.bench.router_live.processes import Cores
from tests.bench.router_live.speed import Sample, canned_engines, measure
from tests.bench.router_live.targets import Site, Target, millrace
from tests.support.observed_router import OUTPUT_VARIABLE
from tests.support.waiting import eventually

CONNECTIONS = 32
STREAMS = 40
BLOCKS = 2048
CALIBRATION_SECONDS = 1.0
# A router that has just started still opens its watches.
START_SECONDS = 1.0
# Kept connections idle for 4 s at the router; what is open long after that is a leak.
SETTLE_SECONDS_MAX = 15.0
GROWTH_MAX = 0.02


@dataclass(frozen=True)
class Holdings:
    """What a router process holds."""

    memory_bytes: int
    sockets: int
    tasks: int


@dataclass(frozen=True)
class Soak:
    """The outcome.

    Attributes:
        rate: Whole answers a second that were asked for.
        growth: Memory of the last tenth over that of the first tenth after the warm-up, less 1.
        before: What the router held before the load.
        after: What it held when the load had ended and connections had had time to close.
    """

    rate: float
    answers: int
    events: int
    failed: int
    hung_up: int
    growth: float
    memory_bytes: float
    before: Holdings
    after: Holdings

    @property
    def leaks(self) -> list[str]:
        """What was not given back, in words."""
        found = []
        if self.growth > GROWTH_MAX:
            found.append(f"memory grew by {self.growth:.1%}")
        if self.after.sockets > self.before.sockets:
            found.append(f"sockets: {self.before.sockets} before, {self.after.sockets} after")
        if self.after.tasks > self.before.tasks:
            found.append(f"tasks: {self.before.tasks} before, {self.after.tasks} after")
        return found


def _told(tasks_file: Path) -> list[int]:
    """Reads what the router has told about its tasks so far."""
    return [int(line) for line in tasks_file.read_text().splitlines()] if tasks_file.exists() else []


async def _holdings(target: Target, tasks_file: Path) -> Holdings:
    assert target.process is not None
    before = len(_told(tasks_file))
    target.process.process.send_signal(signal.SIGUSR1)
    await eventually(lambda: len(_told(tasks_file)) > before, timeout_seconds=10)
    sockets = len(psutil.Process(target.process.pid).net_connections("tcp"))
    return Holdings(target.process.memory_bytes(), sockets, _told(tasks_file)[-1])


async def _settled(target: Target, tasks_file: Path, before: Holdings) -> Holdings:
    """Returns what is held once it is no more than before, or when connections have had time to close."""
    deadline = time.monotonic() + SETTLE_SECONDS_MAX
    while True:
        after = await _holdings(target, tasks_file)
        given_back = after.sockets <= before.sockets and after.tasks <= before.tasks
        if given_back or time.monotonic() > deadline:
            return after
        await asyncio.sleep(0.5)


async def _hang_up_often(target: Target, counted: list[int]) -> None:
    """Begins a stream on a connection of its own, reads a little, leaves; ten times a second."""
    body = {"model": "chat", "messages": [{"role": "user", "content": "x"}], "stream": True}
    headers = {"authorization": f"Bearer {target.key}"}
    while True:
        async with (
            aiohttp.ClientSession(headers=headers, trust_env=False) as session,
            session.post(f"{target.url}/v1/chat/completions", json=body) as answer,
        ):
            await answer.content.readany()
            counted[0] += 1
        await asyncio.sleep(0.1)


async def _watch_memory(target: Target, samples: list[int]) -> None:
    assert target.process is not None
    while True:
        samples.append(target.process.memory_bytes())
        await asyncio.sleep(0.5)


@asynccontextmanager
async def _beside(target: Target, counted: list[int], memory: list[int]) -> AsyncIterator[None]:
    tasks = [
        asyncio.create_task(_hang_up_often(target, counted), name="hang-up"),
        asyncio.create_task(_watch_memory(target, memory), name="memory"),
    ]
    try:
        yield
    finally:
        await cancel_and_wait(*tasks)


def _growth(memory: list[int]) -> tuple[float, float]:
    """Returns the growth after the warm-up (a fifth) and the memory at the end, bytes."""
    steady = memory[len(memory) // 5 :]
    tenth = max(1, len(steady) // 10)
    first, last = statistics.median(steady[:tenth]), statistics.median(steady[-tenth:])
    return last / first - 1, last


async def _load(site: Site, target: Target, rate: float, seconds: float) -> list[Sample]:
    whole = ["--connections", str(CONNECTIONS), "--rate", f"{rate:.0f}", "--prompts", "90000000"]
    streams = ["--stream", "1", "--connections", str(STREAMS), "--ramp-ms", "2000"]
    return await asyncio.gather(
        *(measure(site, target, [*each, "--seconds", str(seconds)]) for each in (whole, streams))
    )


async def soak(site: Site, *, seconds: float, share: float) -> Soak:
    """Runs the load against a fresh router.

    Raises:
        Unavailable: The engines or the router did not start, or the load client gave up.
    """
    tasks_file = site.directory / "tasks"
    command = (sys.executable, "-m", "tests.support.observed_router")
    async with AsyncExitStack() as stack:
        urls = await stack.enter_async_context(canned_engines(site, blocks=BLOCKS))
        target = await stack.enter_async_context(
            millrace(site, urls, program=command, environment={OUTPUT_VARIABLE: str(tasks_file)})
        )
        await asyncio.sleep(START_SECONDS)
        before = await _holdings(target, tasks_file)
        fastest = await measure(
            site, target, ["--connections", str(CONNECTIONS), "--seconds", str(CALIBRATION_SECONDS)]
        )
        rate = share * float(fastest.account["answers_per_second"])
        counted, memory = [0], list[int]()
        async with _beside(target, counted, memory):
            accounts = await _load(site, target, rate, seconds)
        after = await _settled(target, tasks_file, before)
    growth, memory_bytes = _growth(memory)
    return Soak(
        rate=rate,
        answers=sum(int(each.account["answers"]) for each in accounts),
        events=sum(int(each.account["events"]) for each in accounts),
        failed=sum(each.failed for each in accounts),
        hung_up=counted[0],
        growth=growth,
        memory_bytes=memory_bytes,
        before=before,
        after=after,
    )


def _report(outcome: Soak, seconds: float, share: float) -> None:
    print(
        f"\n{seconds:g} s at {share:.0%} of the router's maximum ({outcome.rate:,.0f} whole answers/s, "
        f"{STREAMS} streams beside them, {outcome.hung_up:,} clients that hung up)\n"
    )
    rows = {
        "answers / streamed events / failed": f"{outcome.answers:,} / {outcome.events:,} / {outcome.failed}",
        "memory at the end": f"{outcome.memory_bytes / 2**20:.0f} MiB",
        "growth after the warm-up": f"{outcome.growth:+.2%}",
        "sockets before / after": f"{outcome.before.sockets} / {outcome.after.sockets}",
        "tasks before / after": f"{outcome.before.tasks} / {outcome.after.tasks}",
    }
    print("| figure | value |\n|---|---|")
    for title, value in rows.items():
        print(f"| {title} | {value} |")


def main() -> None:
    """Prints the table; exit code 1 where something leaks or fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seconds", type=float, default=3600.0)
    parser.add_argument(
        "--share", type=float, default=0.7, help="of the highest rate that was measured before"
    )
    options = parser.parse_args()
    cores = Cores.of_this_machine()
    os.sched_setaffinity(0, {int(core) for core in cores.load.split(",")})
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="millrace-soak-") as directory, event_loop_runner() as runner:
        outcome = runner.run(soak(Site(Path(directory), cores), seconds=options.seconds, share=options.share))
    _report(outcome, options.seconds, options.share)
    print(f"\n{time.monotonic() - began:.0f} s in all")
    problems = [*outcome.leaks, *([f"{outcome.failed} requests failed"] if outcome.failed else [])]
    if problems:
        sys.exit("; ".join(problems))


if __name__ == "__main__":
    main()
