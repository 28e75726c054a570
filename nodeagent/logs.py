"""Engines' log files: the last lines, following, and keeping them small.

Engines write their files themselves (see `runtimes.process`), so a file is shortened in place: its
content is copied to a numbered file and the file cut to nothing. Lines written between the two steps are
lost; that is the price of an engine that needs no agent to go on writing.
"""

import asyncio
import errno
import os
import shutil
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import structlog

_log = structlog.get_logger(__name__)

# A file beyond this is rotated; the agent looks every ROTATION_PERIOD_SECONDS.
ROTATE_BYTES = 32 * 1024 * 1024
ROTATION_PERIOD_SECONDS = 10.0
KEPT_ROTATIONS = 2
# Lines beyond this are cut: some engines log whole requests.
LINE_BYTES_MAX = 16 * 1024
# No more than this is read from the end of a file, whatever the number of lines.
TAIL_BYTES_MAX = 16 * 1024 * 1024
# Logs of ended replicas that are kept for a look afterwards.
KEPT_ENDED_LOGS = 50
FOLLOW_INTERVAL_SECONDS = 0.1
PROGRESS_SECONDS = 5.0
_BLOCK_BYTES = 64 * 1024
_NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT})


@dataclass(frozen=True, slots=True)
class Tail:
    """The last lines of a file, and where the rest begins."""

    lines: list[str]
    offset: int


def log_path(directory: Path, replica: str) -> Path:
    """Returns a replica's log file."""
    return directory / f"{replica}.log"


def read_tail(path: Path, lines: int) -> Tail:
    """Reads the last lines; a file that does not exist has none."""
    data, size = _read_end(path, lines)
    found = _split(data)
    # An unfinished last line is left to whoever follows the file.
    unfinished = len(data) - (data.rfind(b"\n") + 1)
    if len(found) < lines:
        earlier, _ = _read_end(_rotated(path, 1), lines - len(found))
        found = _split(earlier) + found
    return Tail([decode_line(line) for line in found[-lines:]] if lines else [], size - unfinished)


def last_lines(path: Path, lines: int) -> list[str]:
    """Reads the last lines, an unfinished one included: for a program that died while writing."""
    data, _ = _read_end(path, lines)
    found = [line for line in data.split(b"\n") if line.strip()]
    return [decode_line(line) for line in found[-lines:]]


def decode_line(line: bytes) -> str:
    """Makes text of a line, cut to its bound, without its end."""
    cut = line[:LINE_BYTES_MAX].rstrip(b"\r").decode("utf-8", "replace")
    return cut + " […]" if len(line) > LINE_BYTES_MAX else cut


async def follow(path: Path, offset: int, ended: Callable[[], bool]) -> AsyncIterator[str | None]:
    """Yields new lines until the engine has ended, and None as a sign of life every few seconds."""
    buffer = b""
    idle_seconds = 0.0
    while True:
        # Asked before reading: what was written before the end is certainly seen.
        over = ended()
        data, offset = await asyncio.to_thread(_read_from, path, offset)
        *lines, buffer = (buffer + data).split(b"\n")
        if len(buffer) > LINE_BYTES_MAX:
            lines, buffer = [*lines, buffer], b""
        for line in lines:
            idle_seconds = 0.0
            yield decode_line(line)
        if data:
            continue
        if over:
            if buffer:
                yield decode_line(buffer)
            return
        if idle_seconds >= PROGRESS_SECONDS:
            idle_seconds = 0.0
            yield None
        await asyncio.sleep(FOLLOW_INTERVAL_SECONDS)
        idle_seconds += FOLLOW_INTERVAL_SECONDS


def rotate(path: Path, limit_bytes: int = ROTATE_BYTES) -> bool:
    """Shortens a file that has grown beyond the limit; tells whether it did.

    Raises:
        OSError: The file cannot be copied for another reason than a full disk.
    """
    try:
        if path.stat().st_size <= limit_bytes:
            return False
    except FileNotFoundError:
        return False
    for number in range(KEPT_ROTATIONS, 1, -1):
        earlier = _rotated(path, number - 1)
        if earlier.exists():
            earlier.replace(_rotated(path, number))
    try:
        shutil.copyfile(path, _rotated(path, 1))
    except OSError as error:
        if error.errno not in _NO_SPACE:
            raise
        # Lines are worth less than room on the disk, which the engines and the journal need.
        _rotated(path, 1).unlink(missing_ok=True)
        _log.warning("no room to keep the log's earlier lines, they are dropped", path=str(path))
    os.truncate(path, 0)
    return True


def prune(directory: Path, running: Iterable[str], keep: int = KEPT_ENDED_LOGS) -> None:
    """Deletes the oldest logs of ended replicas beyond the number to keep."""
    names = set(running)
    ended = [path for path in directory.glob("*.log") if path.stem not in names]
    ended.sort(key=lambda path: path.stat().st_mtime, reverse=True)
    for path in ended[keep:]:
        for each in (path, *(_rotated(path, number) for number in range(1, KEPT_ROTATIONS + 1))):
            each.unlink(missing_ok=True)


def _rotated(path: Path, number: int) -> Path:
    return path.with_name(f"{path.name}.{number}")


def _split(data: bytes) -> list[bytes]:
    return data.split(b"\n")[:-1]


def _read_end(path: Path, lines: int) -> tuple[bytes, int]:
    """Reads blocks from the end until there are enough line ends; returns them and the file's size."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            position, data = size, b""
            while position > 0 and data.count(b"\n") <= lines and len(data) < TAIL_BYTES_MAX:
                step = min(_BLOCK_BYTES, position)
                position -= step
                file.seek(position)
                data = file.read(step) + data
            if position > 0:
                # The first line may be cut.
                data = data[data.find(b"\n") + 1 :]
            return data, size
    except FileNotFoundError:
        return b"", 0


def _read_from(path: Path, offset: int) -> tuple[bytes, int]:
    """Reads the next block; a file that has become shorter was rotated and is read from its start."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            start = offset if offset <= size else 0
            file.seek(start)
            data = file.read(_BLOCK_BYTES)
            return data, start + len(data)
    except FileNotFoundError:
        return b"", offset
