"""Child processes on chosen cores: started, waited for, their processor time read, ended.

In: a command, the cores it may use, a file for its output. Out: `Pinned`, whose whole tree is counted and
ended.
Must not: leave a process behind; the kernel kills children whose benchmark has died.
"""

import asyncio
import os
import shutil
import signal
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.bench.router_live.native import Unavailable

_STOP_SECONDS = 15.0


@dataclass(frozen=True)
class Cores:
    """Which cores (as taskset writes them) the router runs on, and which the load and the engines."""

    router: str
    load: str

    @classmethod
    def of_this_machine(cls) -> "Cores":
        """One core for the router, another for all else; they share where there is only one."""
        usable = sorted(os.sched_getaffinity(0))
        return cls(str(usable[0]), ",".join(str(core) for core in usable[1:]) or str(usable[0]))


@dataclass
class Pinned:
    """A running process and what it has started."""

    process: asyncio.subprocess.Process
    log: Path

    @property
    def pid(self) -> int:
        return self.process.pid

    def tree(self) -> list[psutil.Process]:
        """The process and all that descend from it, as far as they live."""
        try:
            own = psutil.Process(self.pid)
            return [own, *own.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def cpu_seconds(self) -> float:
        """Processor time of the whole tree since its start, all threads, ended children included."""
        total = 0.0
        for each in self.tree():
            try:
                times = each.cpu_times()
            except psutil.NoSuchProcess:
                continue
            total += times.user + times.system + times.children_user + times.children_system
        return total

    def memory_bytes(self) -> int:
        """Resident memory of the whole tree; pages shared between workers count in each."""
        total = 0
        for each in self.tree():
            try:
                total += each.memory_info().rss
            except psutil.NoSuchProcess:
                continue
        return total

    def tail(self) -> str:
        """The last lines of its output, in one line."""
        lines = self.log.read_text(errors="replace").strip().splitlines()[-3:]
        return " / ".join(line.strip()[:200] for line in lines) or "no output"

    async def stop(self) -> None:
        """SIGTERM to its session, SIGKILL where that is not enough."""
        if self.process.returncode is None:
            self._signal(signal.SIGTERM)
            try:
                async with asyncio.timeout(_STOP_SECONDS):
                    await self.process.wait()
            except TimeoutError:
                pass
        self._signal(signal.SIGKILL)
        await self.process.wait()

    def _signal(self, number: signal.Signals) -> None:
        try:
            os.killpg(self.pid, number)
        except ProcessLookupError:
            return


@asynccontextmanager
async def pinned(
    command: Sequence[str], *, cores: str, log: Path, environment: Mapping[str, str] | None = None
) -> AsyncIterator[Pinned]:
    """Runs a command on some cores while the body runs.

    Raises:
        Unavailable: taskset or setpriv (both util-linux) is missing.
    """
    prefix = ["taskset", "-c", cores, "setpriv", "--pdeathsig", "KILL", "--"]
    for needed in ("taskset", "setpriv"):
        if shutil.which(needed) is None:
            raise Unavailable(f"no {needed}: install util-linux")
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        process = await asyncio.create_subprocess_exec(
            *prefix,
            *command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env={**os.environ, **(environment or {})},
            start_new_session=True,
        )
    running = Pinned(process, log)
    try:
        yield running
    finally:
        await running.stop()


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


async def wait_answering(running: Pinned, url: str, *, timeout_seconds: float = 90.0) -> None:
    """Returns once GET `url` is 200.

    Raises:
        Unavailable: The process ended, or the time is over; with the last lines of its output.
    """
    deadline = time.monotonic() + timeout_seconds
    while not await asyncio.to_thread(_answers, url):
        if running.process.returncode is not None:
            raise Unavailable(f"ended with code {running.process.returncode}: {running.tail()}")
        if time.monotonic() > deadline:
            raise Unavailable(f"not ready after {timeout_seconds:.0f} s: {running.tail()}")
        await asyncio.sleep(0.1)
