"""Runs the simulator for tests: inside the test's loop, or as the process that users start."""

import asyncio
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import pytest

import nodeagent
from nodeagent.engines.simulator.api import SimulatorApi
from nodeagent.engines.simulator.engine import SimulatedEngine
from nodeagent.engines.simulator.engine_model import EngineModel
from nodeagent.engines.simulator.faults import Faults
from nodeagent.engines.simulator.flags import parse_settings
from nodeagent.engines.simulator.http_server import HttpServer

REPOSITORY = Path(nodeagent.__path__[0]).parent
FAST = ("--inter-token-latency-ms", "1", "--prefill-tokens-per-second", "0")


@dataclass
class Simulator:
    url: str
    client: aiohttp.ClientSession
    model: EngineModel
    engine: SimulatedEngine
    api: SimulatorApi
    server: HttpServer

    async def metric(self, line_start: str) -> float:
        async with self.client.get(f"{self.url}/metrics") as response:
            text = await response.text()
        matching = [line for line in text.splitlines() if line.startswith(line_start)]
        assert len(matching) == 1, (line_start, matching)
        return float(matching[0].rpartition(" ")[2])


Serve = Callable[..., Awaitable[Simulator]]


@pytest.fixture
async def serve() -> AsyncIterator[Serve]:
    """Starts a simulator in this loop; flags as on the command line."""
    started: list[Simulator] = []

    async def start(*flags: str) -> Simulator:
        settings = parse_settings(
            ["--model", "/models/tiny", "--served-model-name", "tiny", "other", *FAST, *flags]
        )
        engine = SimulatedEngine(settings)
        engine.open_kv_events()
        api = SimulatorApi(settings, engine, Faults(settings.faults))
        server = HttpServer(api.handle)
        port = await server.start("127.0.0.1", 0)
        url = f"http://127.0.0.1:{port}"
        model = engine.drivers[0].model
        simulator = Simulator(url, aiohttp.ClientSession(), model, engine, api, server)
        started.append(simulator)
        return simulator

    yield start
    for simulator in started:
        await simulator.client.close()
        await simulator.server.close()
        await simulator.engine.close()


@dataclass
class Launched:
    url: str
    process: asyncio.subprocess.Process
    lines: list[str] = field(default_factory=list)

    async def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        async with asyncio.timeout(10):
            return await self.process.wait()


Launch = Callable[..., Awaitable[Launched]]


@pytest.fixture
async def launch() -> AsyncIterator[Launch]:
    """Starts the simulator as a process and waits until it says that it listens."""
    launched: list[Launched] = []

    async def start(*flags: str) -> Launched:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *("-m", "nodeagent.engines.simulator", "--model", "tiny"),
            *("--host", "127.0.0.1", "--port", "0", *FAST, *flags),
            cwd=REPOSITORY,
            stdout=asyncio.subprocess.PIPE,
        )
        simulator = Launched("", process)
        launched.append(simulator)
        assert process.stdout is not None
        async with asyncio.timeout(15):
            while True:
                line = (await process.stdout.readline()).decode()
                assert line, f"ended before it listened: {simulator.lines}"
                simulator.lines.append(line)
                if "http://" in line:
                    simulator.url = line.split()[-1]
                if "Application startup complete." in line:
                    return simulator

    yield start
    for simulator in launched:
        if simulator.process.returncode is None:
            simulator.process.kill()
        # Reading to the end lets the transport close within the test's loop.
        await simulator.process.communicate()
