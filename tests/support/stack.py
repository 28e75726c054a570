"""A whole local Millrace for tests: real processes, real etcd, ports of its own.

`LocalStack.start` runs `millrace-local up` as a user would, in a folder of its own, and reads
`local.json`. `stop` ends it with SIGINT, as Ctrl-C does, and checks that no process is left.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from nodeagent.runtimes.base import LABEL_REPLICA
from tests.support.ports import free_ports

LEFT_SECONDS = 5.0
REPOSITORY = Path(__file__).resolve().parents[2]


@dataclass
class LocalStack:
    """A running stack.

    Attributes:
        directory: Its state.
        process: The foreground process.
    """

    directory: Path
    process: subprocess.Popen[bytes]
    output: Path

    @property
    def description(self) -> dict[str, Any]:
        """The present `local.json`."""
        content: dict[str, Any] = json.loads((self.directory / "local.json").read_text())
        return content

    @property
    def text(self) -> str:
        """What the foreground process has printed."""
        return self.output.read_text()

    def admin_headers(self) -> dict[str, str]:
        """Headers of the bootstrap admin."""
        return {"authorization": f"Bearer {self.description['admin_token']}"}

    def user_headers(self) -> dict[str, str]:
        """Headers of the bundled deployment's key."""
        return {"authorization": f"Bearer {self.description['api_key']}"}

    def engine_pids(self, deployment: str = "") -> list[int]:
        """Leaders of the engines' process groups, by the label that the agent gives them.

        Args:
            deployment: Name whose engines are meant; all engines for an empty one.
        """
        prefix = f"{deployment}-" if deployment else ""
        return sorted(
            process.pid
            for process in self.processes()
            if (replica := _environment(process).get(LABEL_REPLICA))
            and replica.startswith(prefix)
            and os.getpgid(process.pid) == process.pid
        )

    def processes(self) -> list[psutil.Process]:
        """Every process that belongs to this stack."""
        found = []
        for process in psutil.process_iter():
            environment = _environment(process)
            if environment.get("MILLRACE_TEST_STACK") == str(self.directory) or (
                str(self.directory) in environment.get("MILLRACE_HOME", "")
            ):
                found.append(process)
        return found

    def wait(self, predicate: Callable[[], object], *, timeout_seconds: float, message: str) -> None:
        """Polls until the predicate holds; shows the stack's own words when it does not."""
        deadline = time.monotonic() + timeout_seconds
        while not predicate():
            if time.monotonic() > deadline:
                raise AssertionError(f"{message}\n{self.text}\n{_logs(self.directory)}")
            time.sleep(0.05)

    def stop(self) -> int:
        """Ends it as Ctrl-C does and checks that nothing is left."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
        code = self.process.wait(timeout=90)
        deadline = time.monotonic() + LEFT_SECONDS
        while (left := self.processes()) and time.monotonic() < deadline:
            time.sleep(0.05)
        commands = [f"{process.pid}: {' '.join(process.cmdline())}" for process in left]
        for process in left:
            process.kill()
        assert not commands, f"processes left behind: {commands}"
        return code


def _environment(process: psutil.Process) -> dict[str, str]:
    try:
        if process.status() == psutil.STATUS_ZOMBIE:
            return {}
        return process.environ()
    except (psutil.NoSuchProcess, psutil.AccessDenied, FileNotFoundError):
        return {}


def launch(directory: Path, *options: str) -> LocalStack:
    """Starts `millrace-local up` with ports of its own and does not wait for it."""
    router, grpc, gateway, agent, metrics, etcd, peer = free_ports(7)
    output = directory / "up.log"
    directory.mkdir(parents=True, exist_ok=True)
    with output.open("ab") as stream:
        process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "deploy.local",
                "up",
                f"--directory={directory}",
                f"--router-port={router}",
                f"--grpc-port={grpc}",
                f"--gateway-port={gateway}",
                f"--agent-port={agent}",
                f"--agent-metrics-port={metrics}",
                f"--etcd-port={etcd}",
                f"--etcd-peer-port={peer}",
                *options,
            ],
            cwd=REPOSITORY,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=stream,
            env={**os.environ, "MILLRACE_TEST_STACK": str(directory)},
            start_new_session=True,
        )
    return LocalStack(directory, process, output)


@contextmanager
def local_stack(
    directory: Path, *options: str, ready_seconds: float = 60.0, until: str = "runs in the foreground"
) -> Iterator[LocalStack]:
    """Runs a stack until it has printed `until`, and stops it afterwards."""
    stack = launch(directory, *options)
    try:
        stack.wait(
            lambda: until in stack.text or stack.process.poll() is not None,
            timeout_seconds=ready_seconds,
            message="the stack did not come up in time",
        )
        assert until in stack.text, f"the stack did not come up:\n{stack.text}\n{_logs(directory)}"
        yield stack
    finally:
        stack.stop()


def _logs(directory: Path) -> str:
    parts = []
    for path in sorted((directory / "logs").glob("*.log")):
        tail = path.read_text(errors="replace").splitlines()[-40:]
        parts.append("\n".join([f"--- {path.name}", *tail]))
    return "\n".join(parts)
