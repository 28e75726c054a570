"""The seam between the agent and whatever runs an engine.

In: a command, labels that mark ownership, a log file. Out: a handle on what runs, which tells at once
when it ends. A runtime knows nothing of models or replicas' states.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from nodeagent.engines.base import LaunchCommand

LABEL_REPLICA = "MILLRACE_REPLICA"
LABEL_NODE = "MILLRACE_NODE"
LABEL_INCARNATION = "MILLRACE_INCARNATION"
# Two agents on one machine, as tests run them, tell their engines apart by their data directories.
LABEL_HOME = "MILLRACE_HOME"


@dataclass(frozen=True, slots=True)
class ProcessIdentity:
    """What tells a process from another one that later gets the same number.

    Attributes:
        pid: Process number, which is also its session's and process group's.
        start_ticks: Start time as the kernel counts it.
        boot_id: Which start of the machine the two belong to.
    """

    pid: int
    start_ticks: int
    boot_id: str


class EngineProcess(Protocol):
    """A running engine."""

    @property
    def identity(self) -> ProcessIdentity:
        """What tells it from other processes."""
        ...

    @property
    def exited(self) -> bool:
        """True once it has ended."""
        ...

    @property
    def exit_description(self) -> str:
        """How it ended, for a person; says so where that is unknown."""
        ...

    def memory_bytes(self) -> int | None:
        """Main memory that it and what it started hold; None where that is unknown. Takes milliseconds."""
        ...

    def terminate(self) -> None:
        """Asks it to end."""
        ...

    def kill(self) -> None:
        """Ends it and everything that it started."""
        ...

    def release(self) -> None:
        """Stops watching; it goes on running."""
        ...


class Runtime(Protocol):
    """Starts engines and finds them again."""

    async def start(
        self,
        command: LaunchCommand,
        *,
        labels: Mapping[str, str],
        log_path: Path,
        on_exit: Callable[[], None],
    ) -> EngineProcess:
        """Starts an engine.

        Raises:
            CannotStart: The program cannot be run.
        """
        ...

    async def adopt(
        self, identity: ProcessIdentity, *, labels: Mapping[str, str], on_exit: Callable[[], None]
    ) -> EngineProcess | None:
        """Takes over an engine that an earlier agent started; None where it is gone."""
        ...

    async def sweep(self, identity: ProcessIdentity) -> int:
        """Kills what an engine left behind after its first process ended; returns how many."""
        ...

    async def sweep_unknown(self, labels: Mapping[str, str], is_owned: Callable[[int, str], bool]) -> int:
        """Kills engines that carry the labels and that nobody owns; returns how many processes.

        Args:
            labels: Those of the agent.
            is_owned: Tells whether a session (its number, and the incarnation in its label) belongs to a
                replica. Asked on the event loop after the look at the processes, so that an engine that was
                started meanwhile is known.
        """
        ...
