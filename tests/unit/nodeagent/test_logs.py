"""Log files: tail, follow over rotation, bounds."""

import asyncio
import errno
from pathlib import Path

import pytest

from nodeagent import logs
from tests.support.waiting import eventually


def test_tail_returns_the_last_complete_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.log"
    path.write_bytes(b"".join(b"line %d\n" % n for n in range(50_000)) + b"half")
    tail = logs.read_tail(path, 3)
    assert tail.lines == ["line 49997", "line 49998", "line 49999"]
    assert tail.offset == path.stat().st_size - len(b"half")
    assert logs.last_lines(path, 2) == ["line 49999", "half"]


def test_tail_of_nothing(tmp_path: Path) -> None:
    assert logs.read_tail(tmp_path / "none.log", 10) == logs.Tail([], 0)
    assert logs.last_lines(tmp_path / "none.log", 10) == []


def test_long_lines_and_bad_bytes_are_bounded() -> None:
    assert logs.decode_line(b"\xff\xfe ok\r") == "\ufffd\ufffd ok"
    assert len(logs.decode_line(b"x" * 100_000)) < logs.LINE_BYTES_MAX + 10


def test_rotation_keeps_two_and_tail_reads_across(tmp_path: Path) -> None:
    path = tmp_path / "a.log"
    for turn in range(4):
        path.write_text(f"turn {turn}\n" * 10)
        assert logs.rotate(path, limit_bytes=20)
        assert path.stat().st_size == 0
    assert sorted(each.name for each in tmp_path.iterdir()) == ["a.log", "a.log.1", "a.log.2"]
    path.write_text("now\n")
    assert not logs.rotate(path, limit_bytes=20)
    assert logs.read_tail(path, 2).lines == ["turn 3", "now"]


def test_prune_keeps_running_and_newest(tmp_path: Path) -> None:
    for number in range(5):
        (tmp_path / f"r{number}.log").write_text("x")
        (tmp_path / f"r{number}.log.1").write_text("x")
    logs.prune(tmp_path, ["r0"], keep=1)
    left = {each.name for each in tmp_path.glob("*.log")}
    assert "r0.log" in left
    assert len(left) == 2
    assert len(list(tmp_path.glob("*.log.1"))) == 2


async def test_follow_sees_new_lines_and_survives_truncation(tmp_path: Path) -> None:
    path = tmp_path / "a.log"
    path.write_text("old\n")
    offset = path.stat().st_size
    ended = asyncio.Event()
    seen: list[str | None] = []

    async def read() -> None:
        async for line in logs.follow(path, offset, ended.is_set):
            seen.append(line)  # noqa: PERF401 - the list is watched while it grows

    reader = asyncio.create_task(read(), name="reader")

    async def wait_for(expected: list[str]) -> None:
        await eventually(lambda: seen == expected, interval_seconds=0.01)

    with path.open("a") as log:
        log.write("one\ntw")
        log.flush()
        await wait_for(["one"])
        log.write("o\n")
        log.flush()
        await wait_for(["one", "two"])
        logs.rotate(path, limit_bytes=1)
        log.write("x\n")
        log.flush()
        await wait_for(["one", "two", "x"])
        log.write("last")
    ended.set()
    await reader
    assert seen == ["one", "two", "x", "last"]


def test_a_full_disk_costs_lines_and_not_the_rotation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without room for a copy the file would stay as long as it is, and the disk full, for ever."""
    path = tmp_path / "chat-a.log"
    path.write_bytes(b"x" * 100)

    def out_of_space(_source: Path, target: Path) -> None:
        target.write_bytes(b"x" * 10)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("shutil.copyfile", out_of_space)
    assert logs.rotate(path, limit_bytes=50)
    assert path.stat().st_size == 0
    assert [each.name for each in tmp_path.iterdir()] == ["chat-a.log"]


def test_any_other_trouble_of_a_rotation_keeps_the_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "chat-a.log"
    path.write_bytes(b"x" * 100)

    def refused(*_: Path) -> None:
        raise OSError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("shutil.copyfile", refused)
    with pytest.raises(OSError, match="Permission denied"):
        logs.rotate(path, limit_bytes=50)
    assert path.stat().st_size == 100
