"""The node agent with several control planes, and with engines that nobody owns."""

import asyncio
import os
import signal
import sys
from pathlib import Path

import psutil
import pytest
from millrace.core.v1 import types_pb2

from core.tasks import cancel_and_wait
from nodeagent import supervisor
from nodeagent.agent import Agent
from nodeagent.settings import AgentSettings
from tests.support.fleet import TOKEN, FleetForTests, simulator_assignment
from tests.support.waiting import eventually

pytestmark = pytest.mark.integration

READY = types_pb2.REPLICA_STATE_READY


def _agent(folder: Path, *ports: int) -> Agent:
    (folder / "token").write_text(TOKEN)
    return Agent(
        AgentSettings(
            _cli_parse_args=False,
            node="node-1",
            grpc_port=0,
            metrics_port=0,
            controlplane_target=",".join(f"127.0.0.1:{port}" for port in ports),
            fleet_token_file=folder / "token",
            data_directory=folder / "data",
            engine_directory=folder / "engines",
            stop_engines_on_exit=True,
        )
    )


async def test_the_agent_goes_to_another_control_plane_and_keeps_its_engines(tmp_path: Path) -> None:
    fleets = {await fleet.start(): fleet for fleet in (FleetForTests(), FleetForTests())}
    for fleet in fleets.values():
        fleet.assign(simulator_assignment("chat-a"))
    agent, stop = _agent(tmp_path, *fleets), asyncio.Event()
    running = asyncio.create_task(agent.run(stop), name="agent")
    try:
        await eventually(lambda: agent.session.state.connected, timeout_seconds=10)
        first = fleets[int(agent.session.state.target.rpartition(":")[2])]
        await eventually(lambda: first.state("chat-a") == READY, timeout_seconds=20)
        other = next(fleet for fleet in fleets.values() if fleet is not first)
        assert not other.opened
        await first.stop()
        await eventually(lambda: bool(other.opened), timeout_seconds=10)
        (observation,) = other.opened[-1].replicas
        assert (observation.state, observation.pid) == (READY, first.latest["chat-a"].pid)
        await eventually(lambda: other.streams == 1)
        # And back, when that one goes.
        target = agent.session.state.target
        port = next(port for port, fleet in fleets.items() if fleet is first)
        await first.start(port)
        await other.stop()
        await eventually(lambda: len(first.opened) == 2, timeout_seconds=10)
        assert agent.session.state.target != target
        assert psutil.pid_exists(observation.pid)
    finally:
        stop.set()
        await running
        for fleet in fleets.values():
            await fleet.stop()


async def test_an_engine_that_nobody_owns_is_collected_while_the_agent_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "ORPHAN_PERIOD_SECONDS", 0.05)
    fleet = FleetForTests()
    agent = _agent(tmp_path, await fleet.start())
    running = asyncio.create_task(agent.run(asyncio.Event()), name="agent")
    stray: asyncio.subprocess.Process | None = None
    try:
        fleet.assign(simulator_assignment("chat-a"))
        await eventually(lambda: fleet.state("chat-a") == READY, timeout_seconds=20)
        own = {"MILLRACE_HOME": str(tmp_path / "data"), "MILLRACE_NODE": "node-1"}
        command = [sys.executable, "-c", "import time; time.sleep(60)"]
        stray = await asyncio.create_subprocess_exec(
            *command, env={**os.environ, **own, "MILLRACE_INCARNATION": "gone"}, start_new_session=True
        )
        async with asyncio.timeout(10):
            assert await stray.wait() == -signal.SIGKILL
        assert psutil.pid_exists(fleet.latest["chat-a"].pid)
        assert fleet.state("chat-a") == READY
    finally:
        if stray is not None and stray.returncode is None:
            stray.kill()
            await stray.wait()
        await agent.supervisor.stop_all()
        await cancel_and_wait(running)
        await fleet.stop()
