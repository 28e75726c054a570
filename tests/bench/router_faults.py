"""Breaks one thing after another under load and counts the requests that fail.

    python -m tests.bench.router_faults [--away-seconds 60] [--workers 4] [--only NAME ...]

Every fault gets a stand of its own: a real etcd, four simulated engines, each a process, and one
`millrace-router` with several workers and its default strategy; half of the clients stream. The endpoint's
record stays in etcd while its engine is broken: nobody but the router itself protects the requests.
Out: a table in Markdown. Failed requests are counted apart: those on what broke (under way there when it
broke, or sent there before it could be known), and those elsewhere: none, if all is well.
Must not: count a request as good that did not bring a whole completion.
"""

import argparse
import asyncio
import signal
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import aiohttp
from millrace.core.v1 import policy_pb2

from core.settings import event_loop_runner
from core.tasks import cancel_and_wait
from tests.bench.router_live.control_plane import ControlPlane
from tests.bench.router_live.native import Unavailable
from tests.bench.router_live.processes import Cores, Pinned, pinned, wait_answering
from tests.bench.router_live.targets import Site, Target, millrace
from tests.support.load import Outcome, steady_load
from tests.support.ports import free_ports
from tests.support.router_cluster import DEPLOYMENT
from tests.support.waiting import eventually

ENGINES = 4
CLIENTS = 16
STORM_SECONDS = 20.0
# The engine that breaks is the first.
BROKEN = f"{DEPLOYMENT}-0"
MAX_TOKENS = 48
BEFORE_SECONDS, AFTER_SECONDS = 2.0, 4.0
# Shorter than the defaults (120 s and 600 s until the first byte, 60 s between two), so that a table takes
# minutes; what a stalled engine costs grows with them in time, not in number.
TIMEOUT_SECONDS = 5.0
_TIMEOUTS = (
    *("--first-byte-timeout-seconds", str(TIMEOUT_SECONDS)),
    *("--whole-answer-timeout-seconds", str(TIMEOUT_SECONDS)),
    *("--idle-timeout-seconds", str(TIMEOUT_SECONDS)),
)


@dataclass
class Stand:
    """Engines, a router before them, and what stands for the control plane."""

    engines: list[Pinned]
    engine_urls: list[str]
    target: Target

    @property
    def plane(self) -> ControlPlane:
        assert self.target.plane is not None
        return self.target.plane

    async def metrics(self) -> dict[str, float]:
        """Sums of the router's counters over all workers, by name and labels."""
        async with (
            aiohttp.ClientSession(trust_env=False) as session,
            session.get(f"{self.target.url}/metrics") as answer,
        ):
            page = await answer.text()
        pairs = (line.rsplit(" ", 1) for line in page.splitlines() if line and line[0] != "#")
        return {name: float(value) for name, value in pairs}

    async def faults_counted(self) -> float:
        """Failures that the router has held against engines so far."""
        return sum(
            value
            for name, value in (await self.metrics()).items()
            if name.startswith("millrace_router_upstream_errors_total") and 'owner="client"' not in name
        )


Break = Callable[[Stand], Awaitable[float]]
"""Breaks something, returns when the fault is over or at work; the answer is the moment of the fault."""


@asynccontextmanager
async def _stand(site: Site, workers: int, fault: "Fault") -> AsyncIterator[Stand]:
    async with AsyncExitStack() as stack:
        engines, urls = [], []
        for number, port in enumerate(free_ports(ENGINES)):
            command = [
                str(Path(sys.executable).parent / "millrace-simulator"),
                *("--model", "bench", "--served-model-name", site.model, "--host", "127.0.0.1"),
                *("--port", str(port), *(fault.engine_options if number == 0 else ())),
            ]
            log = site.directory / f"engine-{port}.log"
            engine = await stack.enter_async_context(pinned(command, cores=site.cores.load, log=log))
            urls.append(f"http://127.0.0.1:{port}")
            await wait_answering(engine, f"{urls[-1]}/health")
            engines.append(engine)
        arguments = ["--workers", str(workers), *_TIMEOUTS]
        routing = policy_pb2.Routing(stream_continuation=fault.continuation)
        target = await stack.enter_async_context(millrace(site, urls, arguments=arguments, routing=routing))
        assert target.process is not None
        # The first worker answers before the last has read its view.
        log_path = target.process.log
        await eventually(lambda: log_path.read_text().count("view synced") >= workers, timeout_seconds=60)
        yield Stand(engines, urls, target)


async def _kill_engine(stand: Stand) -> float:
    moment = time.monotonic()
    stand.engines[0].process.kill()
    return moment


async def _core_dies(stand: Stand) -> float:
    """Waits until the engine that was started to die in mid-stream has died."""
    async with aiohttp.ClientSession(trust_env=False) as session:

        async def unhealthy() -> bool:
            try:
                async with session.get(f"{stand.engine_urls[0]}/health") as answer:
                    return answer.status != 200
            except aiohttp.ClientError:
                return True

        await eventually(unhealthy, timeout_seconds=30, interval_seconds=0.005)
    return time.monotonic()


async def _stall_engine(stand: Stand) -> float:
    """Stops the process: the kernel goes on accepting connections, nobody answers them."""
    moment = time.monotonic()
    stand.engines[0].process.send_signal(signal.SIGSTOP)
    await asyncio.sleep(3 * TIMEOUT_SECONDS)
    return moment


async def _kill_worker(stand: Stand) -> float:
    assert stand.target.process is not None
    workers = [each for each in stand.target.process.tree()[1:] if "router" in " ".join(each.cmdline())]
    moment = time.monotonic()
    workers[0].kill()
    return moment


def _freeze_samples(seconds: float) -> Break:
    async def freeze(stand: Stand) -> float:
        moment = time.monotonic()
        stand.plane.frozen = True
        await asyncio.sleep(seconds)
        stand.plane.frozen = False
        return moment

    return freeze


def _take_etcd_away(seconds: float) -> Break:
    async def take(stand: Stand) -> float:
        moment = time.monotonic()
        await asyncio.to_thread(stand.plane.etcd.kill)
        await asyncio.sleep(seconds)
        await asyncio.to_thread(stand.plane.etcd.start)
        return moment

    return take


def _storm(seconds: float) -> Break:
    """Client errors of every kind: wrong key, no JSON, no such model, refused by the engine, hung up."""

    async def once(session: aiohttp.ClientSession, stand: Stand, number: int) -> int:
        key = "wrong" if number % 5 == 0 else stand.target.key
        bodies = (
            b'{"model": "chat"}',
            b'{"model": ',
            b'{"model": "nobody", "messages": []}',
            b'{"model": "chat", "messages": [{"role": "user", "content": "x"}], "max_tokens": -1}',
            b'{"model": "chat", "messages": "x"}',
        )
        headers = {"authorization": f"Bearer {key}", "content-type": "application/json"}
        url = f"{stand.target.url}/v1/chat/completions"
        async with session.post(url, data=bodies[number % 5], headers=headers) as answer:
            await answer.read()
            return answer.status

    async def storm(stand: Stand) -> float:
        moment = time.monotonic()
        async with aiohttp.ClientSession(trust_env=False) as session:
            number = 0
            while time.monotonic() - moment < seconds:
                statuses = await asyncio.gather(*(once(session, stand, number + at) for at in range(20)))
                number += 20
                unexpected = [status for status in statuses if not 400 <= status < 500]
                if unexpected:
                    raise AssertionError(f"a client's error was answered with {unexpected}")
        counted = await stand.faults_counted()
        if counted:
            raise AssertionError(f"{counted:.0f} client errors were held against engines")
        return moment

    return storm


@dataclass(frozen=True)
class Fault:
    """What is broken and how, what that engine is started with, whether streams may go on elsewhere."""

    title: str
    breaks: Break
    engine_options: tuple[str, ...] = ()
    continuation: bool = False


def faults(away_seconds: float) -> dict[str, Fault]:
    """All faults by a short name."""
    away = f"{away_seconds:g} s"
    killed, core = "engine killed (kill -9)", "engine's core dies in mid-stream (error event, then 500s)"
    dies = ("--mid-stream-death-after-tokens", str(MAX_TOKENS - 8))
    return {
        "kill": Fault(killed, _kill_engine),
        "kill-continued": Fault(f"{killed}, streams continue", _kill_engine, continuation=True),
        "core": Fault(core, _core_dies, dies),
        "core-continued": Fault(f"{core}, streams continue", _core_dies, dies, continuation=True),
        "stall": Fault(f"engine accepts and never answers, {3 * TIMEOUT_SECONDS:g} s", _stall_engine),
        "worker": Fault("one of the router's workers killed", _kill_worker),
        "storm": Fault(f"storm of client errors, {STORM_SECONDS:g} s", _storm(STORM_SECONDS)),
        "stats": Fault(f"no fresh statistics for {away}", _freeze_samples(away_seconds)),
        "etcd": Fault(f"etcd away for {away}", _take_etcd_away(away_seconds)),
    }


def _was_on_what_broke(outcome: Outcome, moment: float) -> bool:
    """Whether a failed request was under way when it broke, or had been sent to the broken engine since.

    A time-out names no endpoint; here only the engine that stalls lets any request wait.
    """
    return outcome.began <= moment or outcome.endpoint == BROKEN or '"upstream_timeout"' in outcome.error


def _account(outcomes: Sequence[Outcome], moment: float) -> list[str]:
    """Cells for one kind of request: how many, failed there, failed elsewhere, the slowest good answer."""
    failed = [each for each in outcomes if each.failed]
    there = sum(_was_on_what_broke(each, moment) for each in failed)
    slowest = max((each.ended - each.began for each in outcomes if not each.failed), default=0.0)
    return [f"{len(outcomes):,}", str(there), str(len(failed) - there), f"{slowest:.1f} s"]


async def measure(site: Site, fault: Fault, workers: int) -> str:
    """Runs one fault and returns its row."""
    async with _stand(site, workers, fault) as stand:
        headers = {"authorization": f"Bearer {stand.target.key}"}
        async with AsyncExitStack() as stack:
            loads = [
                await stack.enter_async_context(
                    steady_load(
                        stand.target.url,
                        headers,
                        model=DEPLOYMENT,
                        clients=CLIENTS,
                        max_tokens=MAX_TOKENS,
                        stream=stream,
                    )
                )
                for stream in (False, True)
            ]
            breaking = asyncio.create_task(_break_later(fault, stand), name="fault")
            try:
                moment = await breaking
            finally:
                await cancel_and_wait(breaking)
            await asyncio.sleep(AFTER_SECONDS)
            recovered = all(load.succeeded_since(time.monotonic() - 2.0) > 0 for load in loads)
        cells = [cell for load in loads for cell in _account(load.outcomes, moment)]
        failures = [failure for load in loads for failure in load.failures]
        # Those that nothing excuses come first.
        failures.sort(key=lambda failure: _was_on_what_broke(failure, moment))
        for failure in failures[:3]:
            print(
                f"{fault.title}: {failure.began - moment:+.3f} s to {failure.ended - moment:+.3f} s "
                f"after it, at {failure.endpoint or '-'}: {failure.status} {failure.error[-160:]!r}",
                file=sys.stderr,
            )
        return "| " + " | ".join([fault.title, *cells, "yes" if recovered else "NO"]) + " |"


async def _break_later(fault: Fault, stand: Stand) -> float:
    if not fault.engine_options:
        await asyncio.sleep(BEFORE_SECONDS)
    return await fault.breaks(stand)


async def _run(options: argparse.Namespace, site: Site) -> None:
    print(
        f"\n{ENGINES} engines, {options.workers} workers, {CLIENTS} clients with whole answers and {CLIENTS} "
        f"with streams of {MAX_TOKENS} tokens; bounds until the first byte and between two: "
        f"{TIMEOUT_SECONDS:g} s\n"
    )
    figures = ("requests", "failed on what broke", "failed elsewhere", "slowest good")
    kinds = [f"{kind}: {figure}" for kind in ("whole", "streams") for figure in figures]
    print("| fault | " + " | ".join(kinds) + " | serves afterwards |")
    print("|---" * (len(kinds) + 2) + "|", flush=True)
    for name, fault in faults(options.away_seconds).items():
        if name not in options.only:
            continue
        try:
            print(await measure(site, fault, options.workers), flush=True)
        except Unavailable as reason:
            print(f"| {fault.title} | {reason} |" + " |" * (len(kinds)), flush=True)


def main() -> None:
    """Prints the table."""
    names = tuple(faults(60.0))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--away-seconds", type=float, default=60.0, help="how long etcd or samples are away")
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--only", nargs="+", choices=names, default=names)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="millrace-bench-") as directory, event_loop_runner() as runner:
        runner.run(_run(options, Site(Path(directory), Cores.of_this_machine())))


if __name__ == "__main__":
    main()
