"""Reads the process table: `/proc`, and nothing else.

Out: start times, sessions, environments. Every function answers None or leaves a process out when it
ends while it is being read, which happens all the time.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_PROC = Path("/proc")


@dataclass(frozen=True, slots=True)
class ProcessStat:
    """The parts of `/proc/PID/stat` that matter here."""

    pid: int
    state: str
    session: int
    start_ticks: int

    @property
    def running(self) -> bool:
        """False for a process that has ended and only waits to be collected."""
        return self.state not in {"Z", "X"}


def read_stat(pid: int) -> ProcessStat | None:
    """Reads one process; None where there is none."""
    try:
        text = (_PROC / str(pid) / "stat").read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The name stands in parentheses and may hold spaces and parentheses itself.
    fields = text[text.rfind(")") + 2 :].split()
    return ProcessStat(pid=pid, state=fields[0], session=int(fields[3]), start_ticks=int(fields[19]))


def read_environment(pid: int) -> dict[str, str]:
    """Reads the environment that a process was started with.

    Programs that set their own title overwrite this memory: then the result is empty.
    """
    try:
        data = (_PROC / str(pid) / "environ").read_bytes()
    except OSError:
        return {}
    pairs = (entry.decode(errors="replace").partition("=") for entry in data.split(b"\0"))
    return {name: value for name, separator, value in pairs if separator}


def all_stats() -> Iterator[ProcessStat]:
    """Reads every process."""
    for entry in _PROC.iterdir():
        if entry.name.isdecimal():
            stat = read_stat(int(entry.name))
            if stat is not None:
                yield stat


def session_memory_bytes(session: int) -> int | None:
    """Main memory that the processes of a session hold, shared pages divided among those that share them.

    Source: `Pss` of `/proc/PID/smaps_rollup` (proc(5)). None where the kernel does not tell it of any.
    """
    total = 0
    for stat in all_stats():
        if stat.session != session:
            continue
        try:
            text = (_PROC / str(stat.pid) / "smaps_rollup").read_text()
        except OSError:
            continue
        for line in text.splitlines():
            if line.startswith("Pss:"):
                total += int(line.split()[1]) * 1024
                break
    return total or None


def boot_id() -> str:
    """Returns what tells this start of the machine from others; empty where the kernel does not say."""
    try:
        return (_PROC / "sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""
