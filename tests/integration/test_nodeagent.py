"""The node agent with real simulator processes, against a fleet service that the test holds."""

import asyncio
import contextlib
import json
import os
import signal
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import aiohttp
import psutil
import pytest
import pytest_asyncio
from millrace.agent.v1 import node_agent_service_pb2 as messages
from millrace.agent.v1 import node_agent_service_pb2_grpc
from millrace.core.v1 import types_pb2

from core.rpc import call_metadata, open_channel
from core.tasks import cancel_and_wait
from nodeagent.agent import Agent
from nodeagent.settings import AgentSettings
from tests.support.fleet import TOKEN, FleetForTests, simulator_assignment
from tests.support.waiting import eventually

pytestmark = pytest.mark.integration

READY, FAILED, STOPPED = (
    types_pb2.REPLICA_STATE_READY,
    types_pb2.REPLICA_STATE_FAILED,
    types_pb2.REPLICA_STATE_STOPPED,
)
START_SECONDS = 20.0


class RunningAgent:
    """An agent in this process; dropping it leaves its engines, as kill -9 would."""

    def __init__(self, settings: AgentSettings) -> None:
        self.agent = Agent(settings)
        self.stop = asyncio.Event()
        self.task = asyncio.create_task(self.agent.run(self.stop), name="agent-under-test")

    async def end(self) -> None:
        self.stop.set()
        await self.task

    async def drop(self) -> None:
        await cancel_and_wait(self.task)


class World:
    """A fleet service, a data folder, and at most one agent at a time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.fleet = FleetForTests()
        self.port = 0
        self.running: RunningAgent | None = None

    def settings(self, **changes: object) -> AgentSettings:
        token = self.folder / "fleet-token"
        token.write_text(TOKEN)
        devices = self.folder / "devices.json"
        devices.write_text(
            json.dumps([{"id": "cpu", "kind": "cpu", "product": "test", "memory_bytes": 2**33}])
        )
        values: dict[str, object] = {
            "node": "node-1",
            "grpc_port": 0,
            "metrics_port": 0,
            "controlplane_target": f"127.0.0.1:{self.port}",
            "fleet_token_file": token,
            "data_directory": self.folder / "data",
            "engine_directory": self.folder / "engines",
            "engine_port_first": 24000,
            "engine_port_last": 24999,
            "devices_file": devices,
        }
        return AgentSettings.model_validate(values | changes)

    async def start_agent(self, **changes: object) -> RunningAgent:
        self.running = RunningAgent(self.settings(**changes))
        count = len(self.fleet.opened)
        await eventually(lambda: len(self.fleet.opened) > count and self.fleet.streams > 0)
        return self.running

    async def ready(self, replica: str) -> int:
        await eventually(
            lambda: self.fleet.state(replica) >= READY, timeout_seconds=START_SECONDS, interval_seconds=0.005
        )
        assert self.fleet.state(replica) == READY, self.fleet.latest[replica]
        return self.fleet.latest[replica].pid

    def running_requests(self, replica: str) -> int | None:
        stats = self.fleet.stats.get(replica)
        return stats.running_requests if stats is not None else None

    def engine_pids(self) -> list[int]:
        found = []
        for process in psutil.process_iter(["environ"]):
            environment = process.info["environ"] or {}
            if environment.get("MILLRACE_HOME") == str((self.folder / "data").absolute()):
                found.append(process.pid)
        return found


@pytest_asyncio.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    world = World(tmp_path)
    world.port = await world.fleet.start()
    try:
        yield world
    finally:
        if world.running is not None:
            await world.running.drop()
        await world.fleet.stop()
        for pid in world.engine_pids():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
        await eventually(lambda: not [pid for pid in world.engine_pids() if psutil.pid_exists(pid)])


def ended(pid: int) -> Callable[[], bool]:
    def check() -> bool:
        try:
            return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True

    return check


async def test_declared_engine_becomes_ready_and_serves(world: World) -> None:
    await world.start_agent()
    world.fleet.assign(simulator_assignment("chat-a"))
    pid = await world.ready("chat-a")
    states = [each.state for each in world.fleet.reports if each.replica == "chat-a"]
    assert states == sorted(states)
    observation = world.fleet.latest["chat-a"]
    assert observation.healthy
    assert observation.url.startswith("http://127.0.0.1:24")
    assert observation.facts.max_model_len == 2048
    assert observation.facts.kv_cache_tokens > 0
    assert observation.ready_time.ToMilliseconds() >= observation.start_time.ToMilliseconds() > 0
    assert psutil.Process(pid).environ()["MILLRACE_REPLICA"] == "chat-a"
    await eventually(lambda: "chat-a" in world.fleet.stats)
    assert world.fleet.stats["chat-a"].HasField("running_requests")
    await eventually(lambda: world.fleet.heartbeats > 0)
    assert [device.id for device in world.fleet.inventory.devices] == ["cpu"]


async def test_killed_engine_is_reported_failed_within_half_a_second(world: World) -> None:
    await world.start_agent()
    world.fleet.assign(simulator_assignment("chat-a"))
    pid = await world.ready("chat-a")
    started = time.monotonic()
    os.kill(pid, signal.SIGKILL)
    await eventually(lambda: world.fleet.state("chat-a") == FAILED, interval_seconds=0.002)
    assert time.monotonic() - started < 0.5
    assert "SIGKILL" in world.fleet.latest["chat-a"].message


async def test_restarted_agent_adopts_its_engine(world: World) -> None:
    first = await world.start_agent()
    world.fleet.assign(simulator_assignment("chat-a"))
    pid = await world.ready("chat-a")
    incarnation = world.fleet.latest["chat-a"].incarnation
    await first.drop()
    world.fleet.latest.clear()
    await world.start_agent()
    introduced = world.fleet.opened[-1].replicas
    assert [(each.replica, each.state, each.pid) for each in introduced] == [("chat-a", READY, pid)]
    assert introduced[0].incarnation == incarnation
    await eventually(lambda: "chat-a" in world.fleet.stats)
    assert world.fleet.state("chat-a") == READY
    os.kill(pid, signal.SIGKILL)
    await eventually(lambda: world.fleet.state("chat-a") == FAILED, interval_seconds=0.002)


async def test_engine_that_ended_without_an_agent_is_reported_failed(world: World) -> None:
    first = await world.start_agent()
    world.fleet.assign(simulator_assignment("chat-a"))
    pid = await world.ready("chat-a")
    await first.drop()
    os.kill(pid, signal.SIGKILL)
    await eventually(ended(pid))
    await world.start_agent()
    assert [each.state for each in world.fleet.opened[-1].replicas] == [FAILED]


async def test_orphan_is_stopped_after_a_restart(world: World) -> None:
    first = await world.start_agent()
    world.fleet.assign(simulator_assignment("chat-a"), simulator_assignment("chat-b"))
    orphan = await world.ready("chat-a")
    kept = await world.ready("chat-b")
    await first.drop()
    del world.fleet.assignments["chat-a"]
    await world.start_agent()
    await eventually(lambda: world.fleet.state("chat-a") == STOPPED, timeout_seconds=15)
    await eventually(ended(orphan))
    assert not ended(kept)()
    assert world.running is not None
    await eventually(lambda: "chat-a" not in world.running.agent.supervisor.replicas)


async def test_removed_replica_is_stopped_and_forgotten(world: World) -> None:
    running = await world.start_agent()
    world.fleet.assign(simulator_assignment("chat-a"))
    pid = await world.ready("chat-a")
    world.fleet.remove("chat-a")
    await eventually(lambda: world.fleet.state("chat-a") == STOPPED, timeout_seconds=15)
    await eventually(ended(pid))
    await eventually(lambda: not running.agent.supervisor.replicas)
    assert not list((world.folder / "data/journal/replicas").glob("*.json"))


async def test_drain_waits_for_running_requests(world: World) -> None:
    await world.start_agent()
    world.fleet.assign(simulator_assignment("chat-a", inter_token_latency_ms=30))
    await world.ready("chat-a")
    url = world.fleet.latest["chat-a"].url
    body = {"model": "chat", "prompt": "hello", "max_tokens": 100, "stream": False, "ignore_eos": True}
    async with aiohttp.ClientSession() as http:
        request = asyncio.create_task(http.post(f"{url}/v1/completions", json=body), name="long-request")
        await eventually(lambda: world.running_requests("chat-a") == 1)
        world.fleet.drain("chat-a")
        response = await request
        assert response.status == 200
        assert (await response.json())["usage"]["completion_tokens"] == 100
    await eventually(lambda: world.fleet.state("chat-a") == STOPPED, timeout_seconds=15)
    assert world.fleet.latest["chat-a"].message == "drained"


async def test_drain_deadline_ends_requests(world: World) -> None:
    await world.start_agent()
    world.fleet.assign(simulator_assignment("chat-a", inter_token_latency_ms=500))
    await world.ready("chat-a")
    url = world.fleet.latest["chat-a"].url
    body = {"model": "chat", "prompt": "hello", "max_tokens": 1000, "ignore_eos": True}
    async with aiohttp.ClientSession() as http:
        request = asyncio.create_task(http.post(f"{url}/v1/completions", json=body), name="long-request")
        await eventually(lambda: world.running_requests("chat-a") == 1)
        world.fleet.drain("chat-a", deadline_seconds=1.2)
        await eventually(lambda: world.fleet.state("chat-a") == STOPPED, timeout_seconds=15)
        await asyncio.wait([request], timeout=5)
        with contextlib.suppress(aiohttp.ClientError):
            await request
    assert "deadline" in world.fleet.latest["chat-a"].message


async def test_engine_that_crashes_at_start_tells_its_last_lines(world: World) -> None:
    await world.start_agent()
    world.fleet.assign(simulator_assignment("chat-a", fail_at_start=True))
    await eventually(lambda: world.fleet.state("chat-a") == FAILED, timeout_seconds=START_SECONDS)
    observation = world.fleet.latest["chat-a"]
    assert "exit code" in observation.message
    assert "before it was ready" in observation.message
    assert observation.log_tail


async def test_engine_that_is_never_ready_fails_at_its_deadline(world: World) -> None:
    await world.start_agent(start_timeout_seconds=2)
    world.fleet.assign(simulator_assignment("chat-a", never_ready=True))
    await eventually(lambda: world.fleet.state("chat-a") == FAILED, timeout_seconds=START_SECONDS)
    assert "did not become ready in 2 s" in world.fleet.latest["chat-a"].message
    await eventually(lambda: not world.engine_pids())


async def test_unknown_engine_argument_is_a_failure_with_the_reason(world: World) -> None:
    await world.start_agent()
    world.fleet.assign(simulator_assignment("chat-a", port=1))
    await eventually(lambda: world.fleet.state("chat-a") == FAILED)
    assert "extra_args.port" in world.fleet.latest["chat-a"].message


async def test_loss_of_the_control_plane_touches_no_engine(world: World) -> None:
    await world.start_agent()
    world.fleet.assign(simulator_assignment("chat-a"))
    pid = await world.ready("chat-a")
    await world.fleet.stop()
    world.fleet.assign(simulator_assignment("chat-a"))
    streams, opened = world.fleet.streams, len(world.fleet.opened)
    await world.fleet.start(world.port)
    await eventually(lambda: world.fleet.streams > streams, timeout_seconds=10)
    assert len(world.fleet.opened) > opened
    assert world.fleet.opened[-1].replicas[0].pid == pid
    assert not ended(pid)()


async def test_replaced_session_is_opened_anew(world: World) -> None:
    await world.start_agent()
    world.fleet.session_id = "another"
    await eventually(lambda: len(world.fleet.opened) == 2)


async def test_missed_change_leads_to_a_complete_set(world: World) -> None:
    await world.start_agent()
    assignment = simulator_assignment("chat-a")
    world.fleet.assignments["chat-a"] = assignment
    streams = world.fleet.streams
    world.fleet.send(assigned=(assignment,), applies_to="v99")
    await world.ready("chat-a")
    assert world.fleet.streams == streams + 1


async def test_external_url_is_watched_and_never_stopped(world: World) -> None:
    await world.start_agent()
    world.fleet.assign(simulator_assignment("chat-a"))
    pid = await world.ready("chat-a")
    external = simulator_assignment("ext-a")
    external.launch.engine = types_pb2.ENGINE_EXTERNAL
    external.launch.external_url = world.fleet.latest["chat-a"].url + "/v1"
    del external.devices[:]
    world.fleet.assign(external)
    await world.ready("ext-a")
    assert world.fleet.latest["ext-a"].url == world.fleet.latest["chat-a"].url
    assert world.fleet.latest["ext-a"].pid == 0
    world.fleet.drain("ext-a")
    await eventually(lambda: world.fleet.state("ext-a") == STOPPED)
    assert not ended(pid)()


async def test_unreachable_external_url_is_never_ready(world: World) -> None:
    await world.start_agent()
    external = simulator_assignment("ext-a")
    external.launch.engine = types_pb2.ENGINE_EXTERNAL
    external.launch.external_url = "http://127.0.0.1:1"
    world.fleet.assign(external)
    await eventually(
        lambda: "127.0.0.1:1" in world.fleet.latest["ext-a"].message if world.fleet.latest else 0
    )
    assert world.fleet.state("ext-a") == types_pb2.REPLICA_STATE_STARTING


async def test_agent_ends_and_engines_run_on_unless_told_otherwise(world: World) -> None:
    first = await world.start_agent()
    world.fleet.assign(simulator_assignment("chat-a"))
    pid = await world.ready("chat-a")
    await first.end()
    assert not ended(pid)()
    second = await world.start_agent(stop_engines_on_exit=True)
    await second.end()
    world.running = None
    assert ended(pid)()
    assert world.fleet.state("chat-a") == STOPPED


async def test_service_answers_inventory_engines_and_logs(world: World) -> None:
    running = await world.start_agent()
    world.fleet.assign(simulator_assignment("chat-a"))
    await world.ready("chat-a")
    async with open_channel(f"127.0.0.1:{running.agent.grpc_port}") as channel:
        stub: node_agent_service_pb2_grpc.NodeAgentServiceAsyncStub = (
            node_agent_service_pb2_grpc.NodeAgentServiceStub(channel)
        )
        metadata = call_metadata(TOKEN)
        inventory = await stub.GetInventory(messages.GetInventoryRequest(), metadata=metadata)
        assert inventory.inventory.node == "node-1"
        engines = await stub.ListEngines(messages.ListEnginesRequest(), metadata=metadata)
        assert [each.replica for each in engines.replicas] == ["chat-a"]
        call = stub.StreamLogs(messages.StreamLogsRequest(replica="chat-a", follow=True), metadata=metadata)
        with (world.folder / "data/logs/chat-a.log").open("a") as log:
            log.write("a line for the test\n")
        world.fleet.remove("chat-a")
        lines = [message.line async for message in call]
        assert "a line for the test" in lines
    async with (
        aiohttp.ClientSession() as http,
        http.get(f"http://127.0.0.1:{running.agent.metrics_port}/metrics") as response,
    ):
        assert "millrace_agent_session_connected 1.0" in await response.text()
