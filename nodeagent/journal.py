"""The agent's memory across restarts: one small file a replica.

In: what is known of a replica once its engine has been started. Out: the same after a restart, so that
engines which still run are adopted. A file is replaced in one step (write, sync, rename); one that
cannot be read is set aside with a log line, since a lost memory must not stop the agent.
"""

import asyncio
import base64
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import pydantic
import structlog
from millrace.core.v1 import replica_pb2

from core import errors
from nodeagent.runtimes.base import ProcessIdentity

_log = structlog.get_logger(__name__)
_T = TypeVar("_T")

FORMAT = 1
# Replica ids become file names.
_REPLICA = re.compile(r"[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?")


@dataclass(frozen=True, slots=True)
class JournalEntry:
    """What is remembered of a replica.

    Attributes:
        assignment: The last order.
        observation: The last report: state, URL, incarnation, facts.
        process: Its engine; None where it has none.
        port: Port of the engine; 0 where it has none.
    """

    assignment: replica_pb2.ReplicaAssignment
    observation: replica_pb2.ReplicaObservation
    process: ProcessIdentity | None
    port: int


class _EntryFile(pydantic.BaseModel):
    format: int
    assignment: str
    observation: str
    pid: int = 0
    start_ticks: int = 0
    boot_id: str = ""
    port: int = 0


def is_replica_name(name: str) -> bool:
    """Tells whether a replica's id may be part of a path."""
    return _REPLICA.fullmatch(name) is not None


class Journal:
    """Files under `<data directory>/journal/`."""

    def __init__(self, directory: Path) -> None:
        """Takes the folder; it is made when first written to."""
        self._replicas = directory / "replicas"

    async def save(self, entry: JournalEntry) -> None:
        """Remembers a replica.

        Raises:
            Unavailable: The disk refuses.
        """
        file = _EntryFile(
            format=FORMAT,
            assignment=base64.b64encode(entry.assignment.SerializeToString()).decode(),
            observation=base64.b64encode(entry.observation.SerializeToString()).decode(),
            pid=entry.process.pid if entry.process else 0,
            start_ticks=entry.process.start_ticks if entry.process else 0,
            boot_id=entry.process.boot_id if entry.process else "",
            port=entry.port,
        )
        path = self._path(entry.observation.replica)
        await self._in_thread(lambda: _replace(path, file.model_dump_json()))

    async def forget(self, replica: str) -> None:
        """Forgets a replica; one that is not remembered is fine.

        Raises:
            Unavailable: The disk refuses.
        """
        path = self._path(replica)
        await self._in_thread(lambda: path.unlink(missing_ok=True))

    async def load(self) -> list[JournalEntry]:
        """Reads everything that is remembered.

        Raises:
            Unavailable: The disk refuses.
        """
        return await self._in_thread(self._load)

    def _load(self) -> list[JournalEntry]:
        entries: list[JournalEntry] = []
        for path in sorted(self._replicas.glob("*.json")):
            try:
                entries.append(_read_entry(path))
            except ValueError as error:
                _set_aside(path, error)
        return entries

    def _path(self, replica: str) -> Path:
        if not is_replica_name(replica):
            raise errors.InvalidArgument.of("replica", f"{replica[:80]!r} is not a replica id")
        return self._replicas / f"{replica}.json"

    @staticmethod
    async def _in_thread(work: Callable[[], _T]) -> _T:
        try:
            return await asyncio.to_thread(work)
        except OSError as error:
            raise errors.Unavailable(f"the journal cannot be used: {error}") from error


def _read_entry(path: Path) -> JournalEntry:
    file = _EntryFile.model_validate_json(path.read_bytes())
    if file.format != FORMAT:
        raise ValueError(f"format {file.format} is not known")
    return JournalEntry(
        assignment=replica_pb2.ReplicaAssignment.FromString(base64.b64decode(file.assignment)),
        observation=replica_pb2.ReplicaObservation.FromString(base64.b64decode(file.observation)),
        process=ProcessIdentity(file.pid, file.start_ticks, file.boot_id) if file.pid else None,
        port=file.port,
    )


def _replace(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    with temporary.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    # The rename itself is safe only once the folder is on disk.
    descriptor = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _set_aside(path: Path, error: Exception) -> None:
    _log.error("a journal file cannot be read and is set aside", path=str(path), error=str(error)[:300])
    path.rename(path.with_suffix(".unreadable"))
