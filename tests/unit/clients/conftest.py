"""A served fake scheduler, and the command line run against it in a thread of its own."""

import asyncio
import io
import sys
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import pytest_asyncio
import structlog
from millrace_client.cli import execute
from millrace_client.client import MillraceClient

from tests.support.fake_scheduler import ADMIN_TOKEN, FakeScheduler, ServedScheduler, serve_scheduler

VARIABLES = (
    "MILLRACE_SERVER",
    "MILLRACE_TOKEN",
    "MILLRACE_ROUTER_URL",
    "MILLRACE_API_KEY",
    "MILLRACE_NAMESPACE",
    "MILLRACE_TLS_AUTHORITY",
    "MILLRACE_DEBUG",
)


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a run of the command line ended."""

    code: int
    stdout: str
    stderr: str


class _Terminal(io.TextIOWrapper):
    def isatty(self) -> bool:
        return True


class CommandLine:
    """Runs `millrace ...` against the fake; the current folder is an empty one."""

    def __init__(self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        self._capsys = capsys
        self._monkeypatch = monkeypatch

    async def __call__(self, *arguments: str, stdin: str = "", terminal: bool = False) -> Outcome:
        kind = _Terminal if terminal else io.TextIOWrapper
        self._monkeypatch.setattr(sys, "stdin", kind(io.BytesIO(stdin.encode())))
        self._capsys.readouterr()
        code = await asyncio.to_thread(execute, arguments)
        captured = self._capsys.readouterr()
        return Outcome(code, captured.out, captured.err)


@pytest.fixture(autouse=True)
def quiet_server() -> Iterator[None]:
    """Keeps what the fake server logs out of the command line's output: both share this process."""
    with structlog.testing.capture_logs():
        yield


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)


@pytest_asyncio.fixture
async def served() -> AsyncIterator[ServedScheduler]:
    async with serve_scheduler(FakeScheduler()) as served:
        yield served


@pytest.fixture
def scheduler(served: ServedScheduler) -> FakeScheduler:
    return served.fake


@pytest_asyncio.fixture
async def client(served: ServedScheduler) -> AsyncIterator[MillraceClient]:
    async with MillraceClient.connect(served.target, ADMIN_TOKEN) as client:
        yield client


@pytest.fixture
def millrace(
    served: ServedScheduler, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> CommandLine:
    monkeypatch.setenv("MILLRACE_SERVER", served.target)
    monkeypatch.setenv("MILLRACE_TOKEN", ADMIN_TOKEN)
    monkeypatch.setenv("MILLRACE_NAMESPACE", "team-ai")
    return CommandLine(capsys, monkeypatch)
