"""The control plane as a process: it starts without etcd, survives its loss, and stops cleanly."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.support.etcd import EtcdProcess
from tests.support.ports import free_ports
from tests.support.waiting import eventually

TOKEN = "admin-token-of-the-test"
HEADERS = {"Authorization": f"Bearer {TOKEN}"}
DECLARATION = {"models": [{"name": "a", "model": "any", "engine": "simulator"}], "namespace": "team"}


class Process:
    """One control plane."""

    def __init__(self, directory: Path, etcd_endpoint: str) -> None:
        self.grpc_port, self.gateway_port = free_ports(2)
        self.url = f"http://127.0.0.1:{self.gateway_port}"
        self._log = directory / "controlplane.log"
        for name, token in (("admin", TOKEN), ("fleet", "fleet-token-of-the-test")):
            path = directory / f"{name}.token"
            path.touch(mode=0o600)
            path.write_text(token)
        self.arguments = [
            sys.executable, "-m", "controlplane",
            f"--grpc-port={self.grpc_port}",
            f"--gateway-port={self.gateway_port}",
            f"--etcd-endpoints={etcd_endpoint}",
            f"--data-directory={directory / 'data'}",
            f"--admin-token-file={directory / 'admin.token'}",
            f"--fleet-token-file={directory / 'fleet.token'}",
        ]  # fmt: skip
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(self.arguments, stdin=subprocess.DEVNULL, stderr=log, stdout=log)

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        assert self._process is not None
        if self._process.poll() is None:
            self._process.send_signal(number)
        return self._process.wait(timeout=30)

    def log(self) -> str:
        return self._log.read_text()


async def request(process: Process, method: str, path: str, body: Any = None) -> tuple[int, Any]:
    async with (
        aiohttp.ClientSession(headers=HEADERS, trust_env=False) as session,
        session.request(method, process.url + path, json=body) as answer,
    ):
        return answer.status, await answer.json() if answer.content_type == "application/json" else None


async def health(process: Process) -> int:
    try:
        return (await request(process, "GET", "/health"))[0]
    except aiohttp.ClientConnectionError:
        return 0


@pytest.fixture
def process(tmp_path: Path, etcd: EtcdProcess) -> Iterator[Process]:
    made = Process(tmp_path, etcd.endpoint)
    yield made
    if made.running:
        made.stop(signal.SIGKILL)


@pytest.fixture
def etcd() -> Iterator[EtcdProcess]:
    made = EtcdProcess()
    yield made
    made.stop()


@pytest.mark.integration
async def test_starts_without_etcd_survives_its_loss_and_stops_cleanly(
    process: Process, etcd: EtcdProcess
) -> None:
    process.start()

    async def starting() -> bool:
        return await health(process) == 503

    async def serving() -> bool:
        return await health(process) == 200

    await eventually(starting, timeout_seconds=20)
    status, content = await request(process, "GET", "/v1/deployments/team/a")
    assert (status, content["error"]["reason"]) == (503, "ERROR_REASON_STORE_UNAVAILABLE")
    await asyncio.to_thread(etcd.start)
    await eventually(serving, timeout_seconds=20)
    status, content = await request(process, "POST", "/v1/deployments", DECLARATION)
    assert status == 201, content
    etcd.kill()
    assert (await request(process, "GET", "/v1/deployments/team/a"))[0] == 200
    assert (await request(process, "DELETE", "/v1/deployments/team/a"))[0] == 503
    await asyncio.to_thread(etcd.start)

    async def deleted() -> bool:
        return (await request(process, "DELETE", "/v1/deployments/team/a"))[0] == 204

    await eventually(deleted, timeout_seconds=20)
    assert process.running
    assert process.stop() == 0
    assert "Traceback" not in process.log()
    assert TOKEN not in process.log()


@pytest.mark.integration
@pytest.mark.parametrize("broken", ["missing", "empty", "same"])
def test_bad_token_files_are_named_with_the_remedy(process: Process, tmp_path: Path, broken: str) -> None:
    path = tmp_path / "fleet.token"
    if broken == "missing":
        path.unlink()
    else:
        path.write_text("" if broken == "empty" else TOKEN)
    outcome = subprocess.run(process.arguments, capture_output=True, text=True, timeout=30, check=False)
    assert outcome.returncode == 2
    assert len(outcome.stderr.strip().splitlines()) == 1
    assert "fleet" in outcome.stderr
    assert TOKEN not in outcome.stderr


@pytest.mark.integration
@pytest.mark.parametrize("option", ["grpc", "gateway"])
def test_taken_port_is_named_with_the_option(process: Process, option: str) -> None:
    port = process.grpc_port if option == "grpc" else process.gateway_port
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", port))
        taken.listen()
        outcome = subprocess.run(
            [*process.arguments, "--log-style=json"],
            capture_output=True, text=True, timeout=30, check=False,
            env={**os.environ, "GRPC_VERBOSITY": "NONE"},
        )  # fmt: skip
    assert outcome.returncode == 1
    last = outcome.stderr.strip().splitlines()[-1]
    assert str(port) in last
    assert f"--{option}-port" in last
    assert "Traceback" not in outcome.stderr


@pytest.mark.integration
def test_listening_beyond_this_machine_needs_tls(process: Process) -> None:
    outcome = subprocess.run(
        [*process.arguments, "--gateway-host=0.0.0.0"],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert outcome.returncode == 2
    assert "TLS" in outcome.stderr
