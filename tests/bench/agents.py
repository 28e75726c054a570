"""A thousand simulated agents in one process against one real control plane and a real etcd.

    python -m tests.bench.agents [--agents N] [--seconds S] [--period S] [--profile FILE]

Every agent has a connection of its own, opens a session, follows its assignments, reports its replica as the
control plane assigned it, and then sends a heartbeat and a report of stats once a period. The control plane,
with its scheduler, places one replica on each node, and etcd syncs to disk and speaks TLS, as in production.
Printed as a table in Markdown: what was sustained, how late, and who used the processors meanwhile.
"""

import argparse
import asyncio
import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import grpc
import psutil
from millrace.core.v1 import node_pb2, replica_pb2, stats_pb2, types_pb2
from millrace.fleet.v1 import fleet_service_pb2, fleet_service_pb2_grpc

from core.clock import SystemClock, to_timestamp
from core.rpc import call_metadata, open_channel
from core.settings import event_loop_runner
from core.tasks import cancel_and_wait
from tests.chaos.cluster import ADMIN_TOKEN, FLEET_TOKEN, HOST, etcd_options, secure_etcd, write_tokens
from tests.chaos.processes import ManagedProcess
from tests.support.ports import free_ports
from tests.support.waiting import eventually

# Room for one simulator on each machine, so that the scheduler uses them all.
DEVICE_BYTES = 64 * 2**20
# What agents allow a call.
CALL_SECONDS = 3.0
REPLICAS_A_DEPLOYMENT = 100
READY_SECONDS = 120.0
# Sessions that are opened at one time: a machine room that comes back, not a denial of service.
OPENING_AT_ONCE = 100


@dataclass
class Tally:
    """What all agents together have seen since it was reset.

    Attributes:
        latencies: Seconds of each call that was answered, by its kind.
        late: Calls that began more than a period behind their time.
        failed: Calls that were refused or not answered in time.
    """

    latencies: dict[str, list[float]] = field(default_factory=lambda: {"heartbeat": [], "stats": []})
    late: int = 0
    failed: int = 0
    first_failure: str = ""


class SimulatedAgent:
    """One agent: the calls of `nodeagent.session`, without engines behind it."""

    def __init__(self, number: int, target: str, tally: Tally, period_seconds: float) -> None:
        self.name = f"node-{number:04d}"
        self.tally = tally
        self._number = number
        self._period_seconds = period_seconds
        self._channel = open_channel(target)
        self._stub: Any = fleet_service_pb2_grpc.FleetServiceStub(self._channel)
        self._metadata = call_metadata(FLEET_TOKEN)
        self._session_id = ""
        self._assigned: dict[str, replica_pb2.ReplicaAssignment] = {}
        self._clock = SystemClock()

    async def open(self) -> None:
        engine = node_pb2.EngineEnvironment(
            engine=types_pb2.ENGINE_SIMULATOR, version="1", device_kinds=[types_pb2.DEVICE_KIND_CPU]
        )
        device = node_pb2.Device(id="cpu", kind=types_pb2.DEVICE_KIND_CPU, memory_bytes=DEVICE_BYTES)
        inventory = node_pb2.NodeInventory(node=self.name, devices=[device], engines=[engine])
        answer = await self._stub.OpenSession(
            fleet_service_pb2.OpenSessionRequest(inventory=inventory, agent_incarnation="bench"),
            metadata=self._metadata,
            timeout=READY_SECONDS,
        )
        self._session_id = answer.session_id

    async def follow(self) -> None:
        """Follows its assignments and reports each as ready."""
        request = fleet_service_pb2.WatchAssignmentsRequest(session_id=self._session_id)
        async for message in self._stub.WatchAssignments(request, metadata=self._metadata):
            fresh = [each for each in message.assigned if each.replica not in self._assigned]
            self._assigned |= {each.replica: each for each in message.assigned}
            if fresh:
                await self._report(fresh)

    async def _report(self, fresh: list[replica_pb2.ReplicaAssignment]) -> None:
        now = to_timestamp(self._clock.now())
        observations = [
            replica_pb2.ReplicaObservation(
                namespace=each.namespace,
                deployment=each.deployment,
                deployment_uid=each.deployment_uid,
                replica=each.replica,
                generation=each.generation,
                state=types_pb2.REPLICA_STATE_READY,
                state_time=now,
                ready_time=now,
                healthy=True,
                url=f"http://10.0.{self._number // 250}.{self._number % 250}:21000",
                incarnation="bench",
            )
            for each in fresh
        ]
        request = fleet_service_pb2.ReportReplicasRequest(session_id=self._session_id, replicas=observations)
        await self._stub.ReportReplicas(request, metadata=self._metadata, timeout=READY_SECONDS)

    async def beat(self) -> None:
        request = fleet_service_pb2.HeartbeatRequest(session_id=self._session_id)
        await self._every_period("heartbeat", lambda: (self._stub.Heartbeat, request))

    async def sample(self) -> None:
        await self._every_period("stats", lambda: (self._stub.ReportStats, self._stats()))

    def _stats(self) -> fleet_service_pb2.ReportStatsRequest:
        now = to_timestamp(self._clock.now())
        engines = [
            stats_pb2.EngineStats(
                namespace=each.namespace,
                deployment=each.deployment,
                replica=each.replica,
                incarnation="bench",
                sample_time=now,
                running_requests=self._number % 7,
                waiting_requests=0,
                kv_usage_ratio=0.5,
                generation_tokens_total=int(time.monotonic() * 100),
            )
            for each in self._assigned.values()
        ]
        device = stats_pb2.DeviceStats(device_id="cpu", sample_time=now)
        return fleet_service_pb2.ReportStatsRequest(
            session_id=self._session_id, engines=engines, devices=[device]
        )

    async def _every_period(self, kind: str, made: Any) -> None:
        """Calls once a period, agents spread over it; one that is late does not try to catch up."""
        due = time.monotonic() + self._period_seconds * ((self._number * 0.618034) % 1)
        while True:
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            began = time.monotonic()
            if began - due > self._period_seconds:
                self.tally.late += 1
                due = began
            try:
                method, request = made()
                await method(request, metadata=self._metadata, timeout=CALL_SECONDS)
                self.tally.latencies[kind].append(time.monotonic() - began)
            except grpc.aio.AioRpcError as error:
                self.tally.failed += 1
                self.tally.first_failure = self.tally.first_failure or f"{kind}: {error.details()}"
            due += self._period_seconds

    async def close(self) -> None:
        await self._channel.close()


@dataclass(frozen=True)
class Measured:
    """One measurement; rates a second, times in milliseconds, processors in cores."""

    agents: int
    seconds: float
    tally: Tally
    cores: dict[str, float]
    etcd_transactions: float


@dataclass(frozen=True)
class ControlPlaneUnderTest:
    """The process and where it listens."""

    process: ManagedProcess
    grpc_target: str
    gateway_url: str


@contextlib.contextmanager
def _control_plane(directory: Path, etcd: list[str], period: float) -> Iterator[ControlPlaneUnderTest]:
    admin, fleet = write_tokens(directory)
    grpc_port, gateway_port = free_ports(2)
    command = [
        *(sys.executable, "-m", "controlplane"),
        f"--grpc-port={grpc_port}",
        f"--gateway-port={gateway_port}",
        f"--admin-token-file={admin}",
        f"--fleet-token-file={fleet}",
        f"--data-directory={directory / 'controlplane'}",
        f"--heartbeat-seconds={period}",
        f"--stats-seconds={period}",
        *etcd,
    ]
    process = ManagedProcess("controlplane", command, directory / "controlplane.log")
    process.start()
    try:
        yield ControlPlaneUnderTest(process, f"{HOST}:{grpc_port}", f"http://{HOST}:{gateway_port}")
    finally:
        process.kill()


async def _until_healthy(url: str) -> None:
    async with aiohttp.ClientSession(trust_env=False) as session:

        async def healthy() -> bool:
            try:
                async with session.get(f"{url}/health") as answer:
                    return answer.status == 200
            except aiohttp.ClientError:
                return False

        await eventually(healthy, timeout_seconds=30)


async def _declare(url: str, count: int) -> None:
    """Declares one replica for each agent, in deployments of a hundred."""
    headers = {"Authorization": f"Bearer {ADMIN_TOKEN}"}
    async with aiohttp.ClientSession(headers=headers, trust_env=False) as session:
        for number in range(0, count, REPLICAS_A_DEPLOYMENT):
            model = {
                "name": f"bench-{number // REPLICAS_A_DEPLOYMENT}",
                "model": "any",
                "engine": "simulator",
                "replicas": min(REPLICAS_A_DEPLOYMENT, count - number),
            }
            body = {"models": [model], "namespace": "bench"}
            async with session.post(f"{url}/v1/deployments", json=body) as answer:
                assert answer.status == 201, await answer.text()


async def _transactions(url: str) -> float:
    """Raft proposals that etcd has committed so far: each is a write to disk."""
    async with aiohttp.ClientSession(trust_env=False) as session, session.get(url) as answer:
        for line in (await answer.text()).splitlines():
            if line.startswith("etcd_server_proposals_committed_total "):
                return float(line.split()[1])
    return 0.0


async def _open_all(agents: list[SimulatedAgent]) -> float:
    began = time.monotonic()
    gate = asyncio.Semaphore(OPENING_AT_ONCE)

    async def opened(agent: SimulatedAgent) -> None:
        async with gate:
            await agent.open()

    await asyncio.gather(*(opened(each) for each in agents))
    return time.monotonic() - began


async def _measure(
    agents: list[SimulatedAgent], seconds: float, processes: dict[str, psutil.Process], metrics_url: str
) -> Measured:
    tally = Tally()
    for each in agents:
        each.tally = tally
    before = {name: sum(process.cpu_times()[:2]) for name, process in processes.items()}
    written, began = await _transactions(metrics_url), time.monotonic()
    await asyncio.sleep(seconds)
    took = time.monotonic() - began
    cores = {
        name: (sum(process.cpu_times()[:2]) - before[name]) / took for name, process in processes.items()
    }
    return Measured(len(agents), took, tally, cores, (await _transactions(metrics_url) - written) / took)


def _print(measured: Measured, opened_seconds: float, placed_seconds: float, period: float) -> None:
    def row(*cells: object) -> None:
        print("| " + " | ".join(str(cell) for cell in cells) + " |")

    tally = measured.tally
    print(f"\n{measured.agents} agents, one period {period:g} s, {measured.seconds:.0f} s measured\n")
    row("figure", "value")
    row("---", "---:")
    row("all sessions opened in", f"{opened_seconds:.1f} s")
    row("all replicas placed and reported ready in", f"{placed_seconds:.1f} s")
    for kind, values in tally.latencies.items():
        wanted = measured.agents / period
        centiles = statistics.quantiles(values, n=100) if len(values) > 1 else [0.0] * 99
        row(f"{kind}: answered a second (of {wanted:.0f})", f"{len(values) / measured.seconds:.0f}")
        row(
            f"{kind}: p50 / p90 / p99",
            " / ".join(f"{centiles[index] * 1000:.0f}" for index in (49, 89, 98)) + " ms",
        )
    row("calls that began more than a period late", tally.late)
    row("calls that failed", f"{tally.failed} {tally.first_failure}".strip())
    row("etcd: raft proposals a second", f"{measured.etcd_transactions:.0f}")
    for name, cores in measured.cores.items():
        row(f"processors used by {name}", f"{cores:.2f} of {os.cpu_count()}")


async def _run(arguments: argparse.Namespace, directory: Path) -> None:
    with secure_etcd(directory / "etcd", 1) as (layout, members):
        etcd = members[0]
        options = etcd_options(layout, "controlplane", [etcd.member.client_endpoint], password=False)
        with _control_plane(directory, options, arguments.period) as plane:
            await _until_healthy(plane.gateway_url)
            agents = [
                SimulatedAgent(number, plane.grpc_target, Tally(), arguments.period)
                for number in range(arguments.agents)
            ]
            tasks: list[asyncio.Task[None]] = []
            try:
                opened_seconds = await _open_all(agents)
                began = time.monotonic()
                tasks.extend(
                    asyncio.create_task(body, name=f"agent-{each.name}")
                    for each in agents
                    for body in (each.follow(), each.beat(), each.sample())
                )
                await _declare(plane.gateway_url, arguments.agents)
                await eventually(
                    lambda: _all_alive(tasks) and all(each._assigned for each in agents),
                    timeout_seconds=READY_SECONDS,
                    interval_seconds=0.1,
                    message=f"not every agent was assigned a replica\n{plane.process.tail()}",
                )
                placed_seconds = time.monotonic() - began
                # What the start has stirred up settles.
                await asyncio.sleep(5 * arguments.period)
                processes = {
                    "the control plane": psutil.Process(plane.process.pid),
                    "etcd": psutil.Process(etcd.pid),
                    "the agents": psutil.Process(),
                }
                with _profiler(plane.process.pid, arguments):
                    metrics_url = etcd.member.health_url.replace("/health", "/metrics")
                    measured = await _measure(agents, arguments.seconds, processes, metrics_url)
                _print(measured, opened_seconds, placed_seconds, arguments.period)
            finally:
                await cancel_and_wait(*tasks)
                for each in agents:
                    await each.close()


def _all_alive(tasks: list[asyncio.Task[None]]) -> bool:
    """Raises what ended an agent, if one has ended."""
    for task in tasks:
        if task.done():
            task.result()
    return True


@contextlib.contextmanager
def _profiler(pid: int, arguments: argparse.Namespace) -> Iterator[None]:
    """Has py-spy look at the control plane meanwhile, where a file for its profile was given."""
    if arguments.profile is None:
        yield
        return
    command = [
        *("py-spy", "record", "--format", "raw", "--rate", "100", "--pid", str(pid)),
        *("--duration", str(int(arguments.seconds)), "--output", str(arguments.profile)),
    ]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL):
        yield


def main() -> None:
    """Runs the measurement."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--agents", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--period", type=float, default=1.0, help="seconds between heartbeats, and stats")
    parser.add_argument("--profile", type=Path, help="have py-spy, if it is on PATH, write raw stacks there")
    arguments = parser.parse_args()
    with (
        tempfile.TemporaryDirectory(prefix="millrace-agents-") as directory,
        event_loop_runner() as runner,
    ):
        runner.run(_run(arguments, Path(directory)))


if __name__ == "__main__":
    main()
