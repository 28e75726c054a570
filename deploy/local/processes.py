"""Runs the processes of a local stack and starts again what dies.

In come commands, out come running processes with their logs in files. Each has a session of its own, so
that Ctrl-C reaches only this program, which then stops them in order. Nothing here knows what they do.
"""

import asyncio
import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from core.backoff import Backoff, BackoffPolicy

# A process that has run this long has started well; its next death counts as the first again.
SETTLED_SECONDS = 30.0
KILL_AFTER_SECONDS = 25.0


@dataclass(slots=True)
class Program:
    """One process of the stack.

    Attributes:
        name: As in local.json.
        command: What to run.
        log: Where its output goes.
        environment: Variables over those of this process.
        descriptors: Open files that it inherits.
    """

    name: str
    command: Sequence[str]
    log: Path
    environment: Mapping[str, str] = field(default_factory=dict)
    descriptors: tuple[int, ...] = ()
    process: asyncio.subprocess.Process | None = None

    @property
    def pid(self) -> int:
        """Current process id; 0 while it does not run."""
        return self.process.pid if self.process is not None else 0

    async def start(self) -> None:
        """Starts it."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as output:
            self.process = await asyncio.create_subprocess_exec(
                *self.command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                env={**os.environ, **self.environment},
                pass_fds=self.descriptors,
            )

    async def stop(self, grace_seconds: float = KILL_AFTER_SECONDS) -> None:
        """Asks it to end, and kills its process group when it does not."""
        process = self.process
        if process is None:
            return
        if process.returncode is None:
            process.terminate()
            try:
                async with asyncio.timeout(grace_seconds):
                    await process.wait()
            except TimeoutError:
                _kill_group(process.pid)
                await process.wait()
        # Workers that outlived their parent are in its group.
        _kill_group(process.pid)
        self.process = None

    def log_tail(self, lines: int = 15) -> str:
        """Returns the last lines of its log."""
        if not self.log.exists():
            return ""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])


def _kill_group(group: int) -> None:
    try:
        os.killpg(group, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        return


async def keep_running(program: Program, changed: Callable[[], None], report: Callable[[str], None]) -> None:
    """Starts a program again whenever it dies, with back-off, until cancelled.

    Args:
        program: A started program.
        changed: Called after every new start.
        report: Called with a line for the user.
    """
    backoff = Backoff(BackoffPolicy(initial_seconds=0.1, maximum_seconds=10.0))
    while True:
        assert program.process is not None
        started = time.monotonic()
        code = await program.process.wait()
        if time.monotonic() - started > SETTLED_SECONDS:
            backoff.succeeded()
        wait = backoff.failed()
        report(
            f"{program.name} ended ({_describe(code)}); starting it again in {wait:.1f} s; "
            f"its log: {program.log}"
        )
        await asyncio.sleep(wait)
        await program.start()
        changed()


def _describe(code: int) -> str:
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
