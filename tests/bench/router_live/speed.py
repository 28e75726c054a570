"""Requests a second, processor time of an event, added time to the first token: all targets in one run.

    python -m tests.bench.router_live.speed [--rounds 3] [--seconds 4] [--targets direct nginx millrace ...]

Every router has one core, the load client and the engines have another. The targets take turns, round by
round, so that a busy minute of the machine hits all of them; a table's cell is the median of the rounds.
`--hold NAME` starts one target, prints how to reach it, and waits: for a profiler.
Out: Markdown. Must not: hide a failed answer; every table counts them.
"""

import argparse
import asyncio
import json
import math
import os
import shlex
import statistics
import sys
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.bench.router_live.native import Unavailable, build
from tests.bench.router_live.processes import Cores, pinned
from tests.bench.router_live.targets import TARGETS, Site, Target
from tests.support.ports import consecutive_ports
from tests.support.waiting import eventually

ENGINES = 4
WARMUP_SECONDS = 1.0
STREAMS, EVENTS, PACE_MS = 200, 100, 20.0
SPEED_TARGETS = ("direct", "nginx", "sglang-router", "vllm-router", "millrace", "millrace-compiled")
REFERENCE = "sglang-router"


@dataclass(frozen=True)
class Sample:
    """One target in one round: the client's account and the processor time that the target took meanwhile."""

    account: dict[str, Any]
    cpu_seconds: float
    wall_seconds: float

    @property
    def failed(self) -> int:
        return sum(self.account["failures"].values())

    @property
    def cpu_us_per_answer(self) -> float:
        return self.cpu_seconds * 1e6 / max(1, int(self.account["answers"]))

    @property
    def cpu_us_per_event(self) -> float:
        return self.cpu_seconds * 1e6 / max(1, int(self.account["events"]))

    def first_byte_ms(self, percentile: str) -> float:
        return float(self.account["first_byte_ms"][percentile])


@asynccontextmanager
async def canned_engines(
    site: Site, count: int = ENGINES, *, blocks: int = 65_536
) -> AsyncIterator[list[str]]:
    """Runs the canned engines on the load's core and yields their URLs."""
    first = consecutive_ports(count)
    command = [
        str(build("engine")),
        *("--port", str(first), "--engines", str(count)),
        *("--events", str(EVENTS), "--pace-ms", str(PACE_MS), "--blocks", str(blocks)),
    ]
    log = site.directory / "engine.log"
    async with pinned(command, cores=site.cores.load, log=log) as process:
        await eventually(lambda: "listening" in process.log.read_text(), timeout_seconds=10)
        yield [f"http://127.0.0.1:{first + number}" for number in range(count)]


async def measure(site: Site, target: Target, options: Sequence[str]) -> Sample:
    """Runs the load client against a target.

    Raises:
        Unavailable: The client gave up; with its words.
    """
    command = [
        *("taskset", "-c", site.cores.load, str(build("client"))),
        *("--port", str(target.port), "--key", target.key, "--warmup-seconds", str(WARMUP_SECONDS), *options),
    ]
    loop = asyncio.get_running_loop()
    before, began = target.cpu_seconds(), loop.time()
    process = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    output, problem = await process.communicate()
    spent = target.cpu_seconds() - before
    if process.returncode != 0:
        raise Unavailable(problem.decode().strip()[:300])
    return Sample(json.loads(output), spent, loop.time() - began)


def _row(*cells: object) -> None:
    print("| " + " | ".join(str(cell) for cell in cells) + " |", flush=True)


def _median(samples: Sequence[Sample], attribute: str) -> float:
    return statistics.median(float(getattr(each, attribute)) for each in samples)


class Comparison:
    """Targets that take turns, and the rows of those that could not start or not go on."""

    def __init__(self, site: Site, targets: Sequence[Target], absent: dict[str, str]) -> None:
        self._site = site
        self._targets = list(targets)
        self._absent = dict(absent)

    async def rounds(self, options: Sequence[str], rounds: int) -> dict[str, list[Sample]]:
        samples: dict[str, list[Sample]] = {each.name: [] for each in self._targets}
        for _ in range(rounds):
            for target in self._targets:
                if target.name in self._absent:
                    continue
                try:
                    samples[target.name].append(await measure(self._site, target, options))
                except Unavailable as reason:
                    self._absent[target.name] = str(reason)
        return {name: taken for name, taken in samples.items() if taken and name not in self._absent}

    def absent_rows(self, columns: int) -> None:
        for name, reason in self._absent.items():
            _row(name, reason, *([""] * (columns - 2)))

    async def whole_answers(self, rounds: int, seconds: float) -> None:
        """Table (a)."""
        connections = 32
        samples = await self.rounds(
            [*("--connections", str(connections), "--seconds", str(seconds), "--prompt-bytes", "2000")],
            rounds,
        )
        print(
            f"\n(a) whole answers, prompts of 2 kB, {connections} connections, "
            f"{rounds} x {seconds:g} s each\n"
        )
        _row(
            "target",
            "requests/s",
            "of sglang-router's",
            "CPU us a request",
            "core in use",
            "p50 / p99 ms",
            "failed",
        )
        _row(*["---"] * 7)
        reference = samples.get(REFERENCE)
        for name, taken in samples.items():
            rate = statistics.median(each.account["answers_per_second"] for each in taken)
            base = (
                statistics.median(each.account["answers_per_second"] for each in reference)
                if reference
                else 0.0
            )
            busy = statistics.median(each.cpu_seconds / each.wall_seconds for each in taken)
            times = [
                statistics.median(each.first_byte_ms(share) for each in taken) for share in ("p50", "p99")
            ]
            _row(
                name,
                f"{rate:,.0f}",
                f"{rate / base:.2f}" if base else "-",
                f"{_median(taken, 'cpu_us_per_answer'):.1f}",
                f"{busy:.0%}",
                f"{times[0]:.2f} / {times[1]:.2f}",
                sum(each.failed for each in taken),
            )
        self.absent_rows(7)

    async def streams(self, rounds: int, seconds: float, *, at_once: bool) -> None:
        """Tables (b) and (c)."""
        ramp_ms = 0.0 if at_once else EVENTS * PACE_MS
        samples = await self.rounds(
            [
                *("--stream", "1", "--connections", str(STREAMS), "--events", str(EVENTS)),
                *("--seconds", str(seconds), "--ramp-ms", str(ramp_ms), "--prompt-bytes", "2000"),
            ],
            rounds,
        )
        how = "all begin at once" if at_once else "beginnings spread evenly"
        print(
            f"\n(b, c) {STREAMS} streams at a time of {EVENTS} events, one each {PACE_MS:g} ms, {how}, "
            f"{rounds} x {seconds:g} s each; added time is over the engine alone\n"
        )
        _row(
            "target",
            "CPU us an event",
            "of sglang-router's",
            "added first byte p50 / p99 ms",
            "events",
            "failed",
        )
        _row(*["---"] * 6)
        reference, alone = samples.get(REFERENCE), samples.get("engine alone")
        base = _median(reference, "cpu_us_per_event") if reference else 0.0
        for name, taken in samples.items():
            cost = _median(taken, "cpu_us_per_event")
            times = []
            for share in ("p50", "p99"):
                value = statistics.median(each.first_byte_ms(share) for each in taken)
                less = statistics.median(each.first_byte_ms(share) for each in alone) if alone else 0.0
                times.append(value if taken is alone else value - less)
            _row(
                name,
                f"{cost:.1f}" if cost else "-",
                f"{cost / base:.2f}" if base and cost else "-",
                f"{times[0]:.2f} / {times[1]:.2f}" + (" (absolute)" if taken is alone else ""),
                f"{sum(each.account['events'] for each in taken):,}",
                sum(each.failed for each in taken),
            )
        self.absent_rows(6)


async def _compare(options: argparse.Namespace, site: Site) -> None:
    async with AsyncExitStack() as stack:
        urls = await stack.enter_async_context(canned_engines(site))
        targets, absent = [], {}
        for name in options.targets:
            try:
                targets.append(await stack.enter_async_context(TARGETS[name](site, urls)))
            except Unavailable as reason:
                absent[name] = str(reason)
        comparison = Comparison(site, targets, absent)
        print(
            f"one core for the router ({site.cores.router}), the rest for load and engines "
            f"({site.cores.load}); "
            f"{os.cpu_count()} processors; load average {os.getloadavg()[0]:.1f} at the start"
        )
        if "whole" in options.parts:
            await comparison.whole_answers(options.rounds, options.seconds)
        if "streams" in options.parts:
            await comparison.streams(options.rounds, options.seconds, at_once=False)
        if "burst" in options.parts:
            await comparison.streams(options.rounds, options.seconds, at_once=True)


async def _hold(name: str, site: Site) -> None:
    async with canned_engines(site) as urls, TARGETS[name](site, urls) as target:
        process = target.process
        client = shlex.join([str(build("client")), "--port", str(target.port), "--key", target.key])
        print(f"pid {process.pid if process else '-'}, log {process.log if process else '-'}")
        print(f"whole answers: taskset -c {site.cores.load} {client} --connections 32 --seconds 10")
        print(
            f"streams:       taskset -c {site.cores.load} {client} --stream 1 --events {EVENTS} "
            f"--connections {STREAMS} --ramp-ms {EVENTS * PACE_MS:g} --seconds 10"
        )
        print("Ctrl-C ends it, and so does the end of whoever started it", flush=True)
        parent = os.getppid()
        await eventually(lambda: os.getppid() != parent, timeout_seconds=math.inf, interval_seconds=0.5)


def main() -> None:
    """Prints the tables, or holds one target."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--targets", nargs="+", choices=sorted(TARGETS), default=SPEED_TARGETS)
    parser.add_argument(
        "--parts", nargs="+", choices=("whole", "streams", "burst"), default=("whole", "streams", "burst")
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--seconds", type=float, default=4.0, help="measured in each round, after 1 s to warm up"
    )
    parser.add_argument("--hold", choices=sorted(TARGETS), help="start this one and wait")
    options = parser.parse_args()
    cores = Cores.of_this_machine()
    # What this process starts without a word about cores (etcd) belongs to the load's side.
    os.sched_setaffinity(0, {int(core) for core in cores.load.split(",")})
    with tempfile.TemporaryDirectory(prefix="millrace-bench-") as directory:
        site = Site(Path(directory), cores)
        try:
            asyncio.run(_hold(options.hold, site) if options.hold else _compare(options, site))
        except KeyboardInterrupt:
            sys.exit(130)


if __name__ == "__main__":
    main()
