"""Engines as processes of this machine.

Each engine is the leader of a session of its own. Its output goes straight into its log file and it is
not tied to the agent's life, so that it goes on when the agent is killed. The end of a process, ours
or adopted, is seen at once through a pidfd. When the leader has ended, whatever is left of its session
is killed: an engine's workers survive their API server and hold the memory of the device.
"""

import asyncio
import os
import signal
import subprocess
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

import structlog

from core import errors
from nodeagent.engines.base import CannotStart, LaunchCommand
from nodeagent.runtimes.base import LABEL_INCARNATION, ProcessIdentity
from nodeagent.runtimes.processes import (
    ProcessStat,
    all_stats,
    boot_id,
    read_environment,
    read_stat,
    session_memory_bytes,
)

_log = structlog.get_logger(__name__)

# What an engine inherits from the agent. Proxies are left out on purpose: an engine's traffic stays
# between router and engine, and an inherited proxy breaks calls to 127.0.0.1.
INHERITED_NAMES = frozenset(
    {
        "HF_ENDPOINT",
        "HF_HOME",
        "HOME",
        "LANG",
        "LC_ALL",
        "LD_LIBRARY_PATH",
        "LOGNAME",
        "PATH",
        "TMPDIR",
        "TZ",
        "USER",
        "XDG_CACHE_HOME",
    }
)
INHERITED_PREFIXES = ("CUDA_", "NCCL_", "NVIDIA_")


def child_environment(
    own: Mapping[str, str], command: Mapping[str, str], labels: Mapping[str, str]
) -> dict[str, str]:
    """Builds an engine's environment: a small allow list, what the adapter sets, the labels."""
    inherited = {
        name: value
        for name, value in own.items()
        if name in INHERITED_NAMES or name.startswith(INHERITED_PREFIXES)
    }
    # Logs appear when they are written, and modules come from the engine's installation only.
    fixed = {"PYTHONUNBUFFERED": "1", "PYTHONSAFEPATH": "1"}
    return {**inherited, **fixed, **command, **labels}


class WatchedProcess:
    """A process whose end is seen through its pidfd."""

    def __init__(
        self,
        identity: ProcessIdentity,
        descriptor: int,
        on_exit: Callable[[], None],
        child: "subprocess.Popen[bytes] | None" = None,
    ) -> None:
        """Begins to watch; the descriptor belongs to this object from now on."""
        self._identity = identity
        self._descriptor = descriptor
        self._on_exit = on_exit
        self._child = child
        self._loop = asyncio.get_running_loop()
        self._exited = False
        self._exit_description = "how it ended is unknown: an earlier agent had started it"
        self._loop.add_reader(descriptor, self._ended)

    @property
    def identity(self) -> ProcessIdentity:
        """What tells it from other processes."""
        return self._identity

    @property
    def exited(self) -> bool:
        """True once it has ended."""
        return self._exited

    @property
    def exit_description(self) -> str:
        """How it ended, for a person."""
        return self._exit_description

    def memory_bytes(self) -> int | None:
        """Main memory that the whole session holds; None where the kernel does not tell."""
        return session_memory_bytes(self._identity.pid)

    def terminate(self) -> None:
        """Asks the whole process group to end.

        vLLM's API server alone takes several seconds to end its workers, which end at once when asked.
        """
        self._signal_group(signal.SIGTERM)

    def kill(self) -> None:
        """Kills the whole process group."""
        self._signal_group(signal.SIGKILL)

    def release(self) -> None:
        """Stops watching; it goes on running."""
        if self._descriptor < 0:
            return
        self._loop.remove_reader(self._descriptor)
        os.close(self._descriptor)
        self._descriptor = -1
        if self._child is not None and self._child.returncode is None:
            # Popen's destructor would complain about a child that runs on, which is what it shall do.
            self._child.returncode = 0

    def _ended(self) -> None:
        self._exited = True
        # Before the number is given back: until then the group is certainly ours.
        self._kill_group()
        # An adopted process is not our child and its exit status went to someone else.
        with suppress(ChildProcessError):
            result = os.waitid(os.P_PIDFD, self._descriptor, os.WEXITED | os.WNOHANG)
            if result is not None:
                self._exit_description = describe_exit(result.si_code, result.si_status)
        self.release()
        self._on_exit()

    def _signal_group(self, number: signal.Signals) -> None:
        if self._descriptor < 0:
            return
        with suppress(ProcessLookupError):
            # Raises once the leader has been collected: from then on the number may be another's.
            signal.pidfd_send_signal(self._descriptor, 0)
            os.killpg(self._identity.pid, number)

    def _kill_group(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._identity.pid, signal.SIGKILL)


def describe_exit(code: int, status: int) -> str:
    """Puts an exit status into words."""
    if code == os.CLD_EXITED:
        return f"exit code {status}"
    try:
        name = signal.Signals(status).name
    except ValueError:
        name = str(status)
    hint = ": the kernel may have run out of memory" if status == signal.SIGKILL else ""
    return f"killed by signal {name}{hint}"


class ProcessRuntime:
    """Starts engines as processes and finds them again."""

    def __init__(self) -> None:
        self._boot_id = boot_id()

    async def start(
        self,
        command: LaunchCommand,
        *,
        labels: Mapping[str, str],
        log_path: Path,
        on_exit: Callable[[], None],
    ) -> WatchedProcess:
        """Starts an engine in a session of its own.

        Raises:
            CannotStart: The program cannot be run.
        """
        environment = child_environment(os.environ, command.environment, labels)
        child = await asyncio.to_thread(_spawn, command.argv, environment, log_path)
        stat = read_stat(child.pid)
        if stat is None:
            raise errors.Unavailable(f"process {child.pid} vanished although nobody collected it")
        identity = ProcessIdentity(child.pid, stat.start_ticks, self._boot_id)
        return WatchedProcess(identity, os.pidfd_open(child.pid), on_exit, child)

    async def adopt(
        self, identity: ProcessIdentity, *, labels: Mapping[str, str], on_exit: Callable[[], None]
    ) -> WatchedProcess | None:
        """Takes over a process if number, start time, boot and labels agree; None where it is gone."""
        if identity.boot_id != self._boot_id:
            return None
        try:
            descriptor = os.pidfd_open(identity.pid)
        except ProcessLookupError:
            return None
        # The checks come after the descriptor is held: it keeps meaning this very process.
        stat = read_stat(identity.pid)
        same = stat is not None and stat.running and stat.start_ticks == identity.start_ticks
        if not same or not _carries(read_environment(identity.pid), labels):
            os.close(descriptor)
            return None
        return WatchedProcess(identity, descriptor, on_exit)

    async def sweep(self, identity: ProcessIdentity) -> int:
        """Kills what is left of an engine's session after its leader ended; returns how many."""
        if identity.boot_id != self._boot_id:
            return 0
        return await asyncio.to_thread(_sweep_session, identity)

    async def sweep_unknown(self, labels: Mapping[str, str], is_owned: Callable[[int, str], bool]) -> int:
        """Kills engines with these labels that nobody owns; returns how many processes."""
        labelled = await asyncio.to_thread(_labelled, dict(labels))
        orphans = [
            stat
            for stat, incarnations in labelled
            # What an owned engine started in a session of its own carries the engine's label.
            if not any(is_owned(stat.session, each) for each in incarnations)
        ]
        return await asyncio.to_thread(_kill_same, orphans) if orphans else 0


def _spawn(
    argv: tuple[str, ...], environment: Mapping[str, str], log_path: Path
) -> "subprocess.Popen[bytes]":
    try:
        log_path.parent.mkdir(parents=True, exist_ok=True)
        # Appending keeps every write at the end even after the agent has shortened the file.
        with log_path.open("ab") as log:
            return subprocess.Popen(
                argv,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=log_path.parent,
                start_new_session=True,
            )
    except OSError as error:
        raise CannotStart(f"{error.filename or argv[0]} cannot be used: {error.strerror}") from error


def _carries(environment: Mapping[str, str], labels: Mapping[str, str]) -> bool:
    """Tells whether the labels are there; an environment that its process has overwritten proves nothing."""
    return not environment or all(environment.get(name) == value for name, value in labels.items())


def _sweep_session(identity: ProcessIdentity) -> int:
    members = [stat for stat in all_stats() if stat.session == identity.pid and stat.running]
    # A session whose number leads another process belongs to somebody else by now.
    if any(stat.pid == identity.pid and stat.start_ticks != identity.start_ticks for stat in members):
        return 0
    return sum(_kill(stat.pid) for stat in members if stat.start_ticks >= identity.start_ticks)


def _labelled(labels: Mapping[str, str]) -> list[tuple[ProcessStat, set[str]]]:
    """Returns every process of the sessions that carry the labels, with the incarnations seen in each."""
    stats = [stat for stat in all_stats() if stat.running]
    incarnations: dict[int, set[str]] = {}
    for stat in stats:
        environment = read_environment(stat.pid)
        if environment and all(environment.get(name) == value for name, value in labels.items()):
            incarnations.setdefault(stat.session, set()).add(environment.get(LABEL_INCARNATION, ""))
    return [(stat, incarnations[stat.session]) for stat in stats if stat.session in incarnations]


def _kill_same(stats: list[ProcessStat]) -> int:
    """Kills processes, but for those whose number belongs to another one by now."""
    killed = 0
    for stat in stats:
        now = read_stat(stat.pid)
        if now is not None and now.start_ticks == stat.start_ticks:
            killed += _kill(stat.pid)
    return killed


def _kill(pid: int) -> int:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return 0
    _log.info("killed a process that an engine left behind", pid=pid)
    return 1
