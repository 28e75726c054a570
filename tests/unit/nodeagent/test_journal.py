"""The journal: what is saved comes back, what cannot be read is set aside."""

from pathlib import Path

import pytest
from millrace.core.v1 import replica_pb2, types_pb2

from core import errors
from nodeagent.journal import Journal, JournalEntry
from nodeagent.runtimes.base import ProcessIdentity


def entry(replica: str) -> JournalEntry:
    return JournalEntry(
        assignment=replica_pb2.ReplicaAssignment(replica=replica, fencing_token=7),
        observation=replica_pb2.ReplicaObservation(replica=replica, state=types_pb2.REPLICA_STATE_READY),
        process=ProcessIdentity(123, 456, "boot"),
        port=21000,
    )


async def test_saved_entries_come_back(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    await journal.save(entry("a-1"))
    await journal.save(entry("b-1"))
    await journal.save(entry("a-1"))
    assert await Journal(tmp_path).load() == [entry("a-1"), entry("b-1")]
    await journal.forget("a-1")
    await journal.forget("a-1")
    assert await Journal(tmp_path).load() == [entry("b-1")]


async def test_nothing_saved_is_no_error(tmp_path: Path) -> None:
    assert await Journal(tmp_path / "none").load() == []


@pytest.mark.parametrize("text", ["", "{", '{"format": 99, "assignment": "", "observation": ""}', "[]"])
async def test_unreadable_file_is_set_aside(tmp_path: Path, text: str) -> None:
    journal = Journal(tmp_path)
    await journal.save(entry("a-1"))
    (tmp_path / "replicas/b-1.json").write_text(text)
    assert await journal.load() == [entry("a-1")]
    assert (tmp_path / "replicas/b-1.unreadable").exists()


@pytest.mark.parametrize("name", ["", "../x", "a/b", "A", ".x", "x" * 300])
async def test_names_cannot_leave_the_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(errors.InvalidArgument):
        await Journal(tmp_path).save(entry(name))


async def test_unusable_disk_is_unavailable(tmp_path: Path) -> None:
    (tmp_path / "replicas").write_text("a file where the folder should be")
    with pytest.raises(errors.Unavailable):
        await Journal(tmp_path).save(entry("a-1"))
