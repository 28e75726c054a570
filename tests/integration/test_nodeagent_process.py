"""The node agent as a process of its own: kill -9, restart, stop, taken ports."""

import asyncio
import contextlib
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import psutil
import pytest
import pytest_asyncio
from millrace.core.v1 import types_pb2

from tests.support.fleet import TOKEN, FleetForTests, simulator_assignment
from tests.support.waiting import eventually

pytestmark = pytest.mark.integration

READY = types_pb2.REPLICA_STATE_READY


class AgentProcess:
    """Starts `python -m nodeagent` against a fleet service of the test."""

    def __init__(self, folder: Path, fleet: FleetForTests, port: int) -> None:
        self.folder, self.fleet, self.port = folder, fleet, port
        self.processes: list[asyncio.subprocess.Process] = []
        (folder / "token").write_text(TOKEN)

    async def start(self, *options: str, wait: bool = True) -> asyncio.subprocess.Process:
        opened = len(self.fleet.opened)
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "nodeagent",
            "--node=node-1",
            "--grpc-port=0",
            "--metrics-port=0",
            f"--controlplane-target=127.0.0.1:{self.port}",
            f"--fleet-token-file={self.folder / 'token'}",
            f"--data-directory={self.folder / 'data'}",
            f"--engine-directory={self.folder / 'engines'}",
            "--engine-port-first=25000",
            "--engine-port-last=25999",
            *options,
            stderr=asyncio.subprocess.PIPE,
        )
        self.processes.append(process)
        if wait:
            await eventually(lambda: len(self.fleet.opened) > opened, timeout_seconds=20)
        return process

    def engines(self) -> list[psutil.Process]:
        home = str(self.folder / "data")
        return [
            process
            for process in psutil.process_iter(["environ"])
            if (process.info["environ"] or {}).get("MILLRACE_HOME") == home
        ]

    async def clean_up(self) -> None:
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.communicate()
        for engine in self.engines():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(engine.pid, signal.SIGKILL)


@pytest_asyncio.fixture
async def agent(tmp_path: Path) -> AsyncIterator[AgentProcess]:
    fleet = FleetForTests()
    agent = AgentProcess(tmp_path, fleet, await fleet.start())
    try:
        yield agent
    finally:
        await agent.clean_up()
        await fleet.stop()


async def ready(agent: AgentProcess, replica: str) -> int:
    await eventually(lambda: agent.fleet.state(replica) == READY, timeout_seconds=20)
    return agent.fleet.latest[replica].pid


async def test_killed_agent_leaves_its_engine_and_the_next_one_adopts_it(agent: AgentProcess) -> None:
    first = await agent.start()
    agent.fleet.assign(simulator_assignment("chat-a"))
    pid = await ready(agent, "chat-a")
    first.kill()
    await first.wait()
    assert [engine.pid for engine in agent.engines()] == [pid]
    await agent.start()
    assert [(each.replica, each.state, each.pid) for each in agent.fleet.opened[-1].replicas] == [
        ("chat-a", READY, pid)
    ]
    # Adopted, not ours: its end is seen all the same.
    os.kill(pid, signal.SIGKILL)
    await eventually(lambda: agent.fleet.state("chat-a") == types_pb2.REPLICA_STATE_FAILED)
    assert agent.fleet.latest["chat-a"].log_tail


async def test_engine_that_the_journal_does_not_know_is_killed(agent: AgentProcess) -> None:
    first = await agent.start()
    agent.fleet.assign(simulator_assignment("chat-a"))
    await ready(agent, "chat-a")
    first.kill()
    await first.wait()
    for entry in (agent.folder / "data/journal/replicas").glob("*.json"):
        entry.unlink()
    agent.fleet.assignments.clear()
    await agent.start()
    await eventually(lambda: not [each for each in agent.engines() if each.status() != psutil.STATUS_ZOMBIE])


async def test_stop_engines_on_exit_leaves_no_process(agent: AgentProcess) -> None:
    process = await agent.start("--stop-engines-on-exit")
    agent.fleet.assign(simulator_assignment("chat-a"), simulator_assignment("chat-b"))
    await ready(agent, "chat-a")
    await ready(agent, "chat-b")
    agent.fleet.replaces_stopped = True
    process.terminate()
    assert await asyncio.wait_for(process.wait(), 20) == 0
    assert not agent.engines()
    assert agent.fleet.state("chat-a") == types_pb2.REPLICA_STATE_STOPPED


@pytest.mark.parametrize("option", ["--grpc-port", "--metrics-port"])
async def test_taken_port_is_named_with_its_option(agent: AgentProcess, option: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        process = await agent.start(f"{option}={port}", "--log-level=ERROR", wait=False)
        _, error = await asyncio.wait_for(process.communicate(), 20)
    assert process.returncode == 1
    last = error.decode().strip().splitlines()[-1]
    assert str(port) in last
    assert option in last
