"""A whole Millrace of real processes that can be hurt: secure etcd, control planes, agents, router, engines.

In come sizes, out come processes with a wire (`link`) between each control plane and each etcd member, and
between each agent and each control plane. The harness itself reads etcd past the wires. Engines are
simulators, real processes of their own.
"""

import json
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import psutil
from millrace.state.v1 import records_pb2

from core.store import EtcdSettings, EtcdStore, StoreError, keys
from deploy.etcd.layout import Layout, Member
from deploy.etcd.members import MemberProcess
from deploy.etcd.prepare import prepare
from deploy.etcd.users import secure
from tests.chaos.link import Link, open_links
from tests.chaos.processes import ManagedProcess
from tests.chaos.skewed import VARIABLE
from tests.support.ports import free_ports
from tests.support.waiting import eventually

HOST = "127.0.0.1"
ADMIN_TOKEN, FLEET_TOKEN = "admin-token-of-the-test", "fleet-token-of-the-test"
NAMESPACE, DEPLOYMENT = "chaos", "chat"
GIBIBYTE = 2**30
ENGINE_PORT_FIRST = 27000
ENGINE_PORTS_A_NODE = 100
ROUTER_BACKLOG = 1024


@dataclass
class ControlPlane:
    """One control plane and its wires to etcd."""

    name: str
    process: ManagedProcess
    links: list[Link]
    grpc_port: int
    gateway_url: str
    data: Path
    clock_offset: Path

    @property
    def member_id(self) -> str:
        return (self.data / "member_id").read_text().strip()


@dataclass
class AgentNode:
    """One machine: its agent, and its wires to the control planes."""

    name: str
    process: ManagedProcess
    links: list[Link]
    data: Path
    clock_offset: Path

    def engines(self) -> dict[str, psutil.Process]:
        """Live engines of this machine, by replica, found by the label that the agent gives them."""
        found = {}
        for process, environment in labelled_processes(self.data):
            # It may end while it is looked at.
            with suppress(ProcessLookupError):
                if os.getsid(process.pid) == process.pid:
                    found[environment["MILLRACE_REPLICA"]] = process
        return found


def labelled_processes(home: Path) -> list[tuple[psutil.Process, dict[str, str]]]:
    """Every live process with the ownership label of an agent whose data lie here or below."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if process.status() == psutil.STATUS_ZOMBIE:
                continue
            environment = process.environ()
            if environment.get("MILLRACE_HOME", "").startswith(str(home)):
                found.append((process, environment))
    return found


@dataclass
class ChaosCluster:
    """The processes, the wires, and the harness's own view of etcd."""

    directory: Path
    layout: Layout
    etcd: list[MemberProcess]
    store: EtcdStore
    http: aiohttp.ClientSession
    controlplanes: list[ControlPlane] = field(default_factory=list)
    nodes: list[AgentNode] = field(default_factory=list)
    router: ManagedProcess | None = None
    router_url: str = ""
    api_key: str = ""

    async def call(self, method: str, path: str, body: object = None) -> Any:
        """Calls the gateway of the first control plane that answers."""
        refusal = "no control plane answers"
        for each in self.controlplanes:
            try:
                timeout = aiohttp.ClientTimeout(total=5)
                async with self.http.request(
                    method, each.gateway_url + path, json=body, timeout=timeout
                ) as answer:
                    text = await answer.text()
                    if answer.status < 300:
                        return json.loads(text) if text else {}
                    refusal = f"{each.name}: {answer.status} {text[:300]}"
            except (aiohttp.ClientError, TimeoutError) as error:
                refusal = f"{each.name}: {error!r}"
        raise AssertionError(f"{method} {path}: {refusal}")

    async def declare(
        self, name: str, *, replicas: int = 1, extra_args: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        model = {"name": name, "model": "any/model", "engine": "simulator", "replicas": replicas}
        if extra_args:
            model["extra_args"] = extra_args
        answer = await self.call("POST", "/v1/deployments", {"models": [model], "namespace": NAMESPACE})
        made: dict[str, Any] = answer["deployments"][0]
        return made

    async def leader(self) -> ControlPlane:
        """The control plane that leads, as etcd knows it."""
        found = await self.store.get(keys.LIVE_LEADER)
        assert found is not None, "nobody leads"
        member_id = records_pb2.LeaderRecord.FromString(found.value).member_id
        return next(each for each in self.controlplanes if each.member_id == member_id)

    async def silent(self) -> list[str]:
        """Control planes that do not serve."""
        found = [await self.answers(f"{each.gateway_url}/health") for each in self.controlplanes]
        return [each.name for each, answers in zip(self.controlplanes, found, strict=True) if not answers]

    async def answers(self, url: str) -> bool:
        with suppress(aiohttp.ClientError, TimeoutError):
            async with self.http.get(url, timeout=aiohttp.ClientTimeout(total=2)) as answer:
                return answer.status == 200
        return False

    async def decides(self, controlplane: ControlPlane) -> bool:
        """Whether a control plane itself says that it leads."""
        with suppress(aiohttp.ClientError, TimeoutError):
            url = f"{controlplane.gateway_url}/metrics"
            async with self.http.get(url, timeout=aiohttp.ClientTimeout(total=2)) as answer:
                return "\nmillrace_reconciler_is_leader 1.0\n" in await answer.text()
        return False

    async def follower(self) -> ControlPlane:
        leader = await self.leader()
        return next(each for each in self.controlplanes if each is not leader)

    async def etcd_leads(self, member: MemberProcess) -> bool:
        with suppress(aiohttp.ClientError, TimeoutError):
            url = member.member.health_url.replace("/health", "/metrics")
            async with self.http.get(url, timeout=aiohttp.ClientTimeout(total=2)) as answer:
                return "\netcd_server_is_leader 1\n" in await answer.text()
        return False

    async def etcd_member(self, *, leads: bool) -> MemberProcess:
        for each in self.etcd:
            if await self.etcd_leads(each) == leads:
                return each
        raise AssertionError(f"no etcd member with leads={leads}")

    def logs(self, lines: int = 15) -> str:
        processes = [each.process for each in self.controlplanes] + [each.process for each in self.nodes]
        if self.router is not None:
            processes.append(self.router)
        return "\n".join(f"--- {each.name}\n{each.tail(lines)}" for each in processes)


def write_tokens(directory: Path) -> tuple[Path, Path]:
    """Writes the admin's and the fleet's token files."""
    paths = directory / "admin.token", directory / "fleet.token"
    for path, token in zip(paths, (ADMIN_TOKEN, FLEET_TOKEN), strict=True):
        path.touch(mode=0o600)
        path.write_text(token)
    return paths


def _python(module: str) -> list[str]:
    return [sys.executable, "-m", "tests.chaos.skewed", module]


def etcd_options(layout: Layout, user: str, endpoints: list[str], *, password: bool) -> list[str]:
    """Options with which a process acts as an etcd user, by certificate alone or with its password too."""
    folder = layout.client(user)
    named = [f"--etcd-username={user}", f"--etcd-password-file={folder / 'password'}"] if password else []
    return [
        f"--etcd-endpoints={','.join(endpoints)}",
        f"--etcd-tls-ca={folder / 'ca.pem'}",
        f"--etcd-tls-certificate={folder / 'client.pem'}",
        f"--etcd-tls-key={folder / 'client.key'}",
        *named,
    ]


@contextmanager
def secure_etcd(directory: Path, count: int = 3) -> Iterator[tuple[Layout, list[MemberProcess]]]:
    """Runs a cluster of etcd with TLS and users, as `python -m deploy.etcd run` does."""
    ports = iter(free_ports(3 * count))
    members = tuple(
        Member(f"etcd-{number}", HOST, next(ports), next(ports), next(ports)) for number in range(count)
    )
    layout = prepare(directory, members)
    processes = [MemberProcess(layout, each) for each in members]
    try:
        for each in processes:
            each.spawn()
        for each in processes:
            each.wait_healthy()
        secure(layout, [each.client_endpoint for each in members])
        yield layout, processes
    finally:
        for each in processes:
            each.signal(signal.SIGCONT)
            each.kill()


async def _add_controlplane(cluster: ChaosCluster, number: int, *, stack: AsyncExitStack) -> None:
    name = f"controlplane-{number}"
    data = cluster.directory / name
    admin, fleet = write_tokens(cluster.directory)
    grpc_port, gateway_port = free_ports(2)
    links = await open_links(HOST, [each.member.client_port for each in cluster.etcd])
    for link in links:
        stack.push_async_callback(link.close)
    offset = cluster.directory / f"{name}.offset"
    command = [
        *_python("controlplane"),
        f"--grpc-port={grpc_port}",
        f"--gateway-port={gateway_port}",
        *etcd_options(
            cluster.layout, "controlplane", [f"{HOST}:{link.port}" for link in links], password=number > 0
        ),
        f"--data-directory={data}",
        f"--admin-token-file={admin}",
        f"--fleet-token-file={fleet}",
    ]
    process = ManagedProcess(
        name, command, cluster.directory / "logs" / f"{name}.log", environment={VARIABLE: str(offset)}
    )
    stack.callback(process.kill)
    process.start()
    url = f"http://{HOST}:{gateway_port}"
    cluster.controlplanes.append(ControlPlane(name, process, links, grpc_port, url, data, offset))


async def _add_node(cluster: ChaosCluster, number: int, *, stack: AsyncExitStack) -> None:
    name = f"node-{number}"
    data = cluster.directory / name
    data.mkdir()
    devices = cluster.directory / f"{name}.devices.json"
    devices.write_text(json.dumps([{"id": "cpu", "kind": "cpu", "memory_bytes": 8 * GIBIBYTE}]))
    links = await open_links(HOST, [each.grpc_port for each in cluster.controlplanes])
    for link in links:
        stack.push_async_callback(link.close)
    offset = cluster.directory / f"{name}.offset"
    first = ENGINE_PORT_FIRST + number * ENGINE_PORTS_A_NODE
    command = [
        *_python("nodeagent"),
        f"--node={name}",
        "--grpc-port=0",
        "--metrics-port=0",
        f"--controlplane-target={','.join(f'{HOST}:{link.port}' for link in links)}",
        f"--fleet-token-file={cluster.directory / 'fleet.token'}",
        f"--data-directory={data}",
        f"--engine-directory={cluster.directory / 'engines'}",
        f"--devices-file={devices}",
        f"--engine-port-first={first}",
        f"--engine-port-last={first + ENGINE_PORTS_A_NODE - 1}",
    ]
    process = ManagedProcess(
        name, command, cluster.directory / "logs" / f"{name}.log", environment={VARIABLE: str(offset)}
    )
    stack.callback(_kill_engines, data)
    stack.callback(process.kill)
    process.start()
    cluster.nodes.append(AgentNode(name, process, links, data, offset))


def _kill_engines(home: Path) -> None:
    for process, _ in labelled_processes(home):
        with suppress(psutil.Error):
            process.kill()


def _add_router(cluster: ChaosCluster, *, stack: AsyncExitStack) -> None:
    # Held here, as an init system would: a router that is killed refuses nobody meanwhile.
    listener = stack.enter_context(socket.create_server((HOST, 0), backlog=ROUTER_BACKLOG))
    cluster.router_url = f"http://{HOST}:{listener.getsockname()[1]}"
    endpoints = [each.member.client_endpoint for each in cluster.etcd]
    command = [
        *_python("router"),
        f"--listen-fd={listener.fileno()}",
        *etcd_options(cluster.layout, "router", endpoints, password=True),
    ]
    cluster.router = ManagedProcess(
        "router",
        command,
        cluster.directory / "logs" / "router.log",
        environment={VARIABLE: str(cluster.directory / "router.offset")},
        descriptors=(listener.fileno(),),
    )
    stack.callback(cluster.router.kill)
    cluster.router.start()


@asynccontextmanager
async def chaos_cluster(
    directory: Path, *, members: int = 3, controlplanes: int = 2, nodes: int = 3, replicas: int = 3
) -> AsyncIterator[ChaosCluster]:
    """Runs a cluster with one deployment that serves; kills everything at the end."""
    async with AsyncExitStack() as stack:
        layout, etcd = stack.enter_context(secure_etcd(directory / "etcd", members))
        folder = layout.client("controlplane")
        store = EtcdStore(
            EtcdSettings(
                endpoints=tuple(each.member.client_endpoint for each in etcd),
                tls_ca=folder / "ca.pem",
                tls_certificate=folder / "client.pem",
                tls_key=folder / "client.key",
            )
        )
        stack.push_async_callback(store.close)
        headers = {"Authorization": f"Bearer {ADMIN_TOKEN}"}
        http = await stack.enter_async_context(aiohttp.ClientSession(headers=headers, trust_env=False))
        cluster = ChaosCluster(directory, layout, etcd, store, http)
        for number in range(controlplanes):
            await _add_controlplane(cluster, number, stack=stack)
        for number in range(nodes):
            await _add_node(cluster, number, stack=stack)
        _add_router(cluster, stack=stack)
        try:
            await _come_up(cluster, nodes, replicas)
        except AssertionError as error:
            raise AssertionError(f"the cluster did not come up: {error}\n{cluster.logs()}") from error
        yield cluster


async def _come_up(cluster: ChaosCluster, nodes: int, replicas: int) -> None:
    async def joined() -> bool:
        try:
            return len((await cluster.store.list(keys.ACTUAL_NODES)).items) == nodes
        except StoreError:
            return False

    async def serve() -> bool:
        return not await cluster.silent()

    await eventually(joined, timeout_seconds=30)
    await eventually(serve, timeout_seconds=30)
    made = await cluster.declare(DEPLOYMENT, replicas=replicas)
    cluster.api_key = made["apiKey"]
