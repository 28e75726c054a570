"""Simulators as processes of their own: engines that can be killed."""

import asyncio
import re
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import aiohttp

from tests.support.ports import free_ports
from tests.support.router_cluster import DEPLOYMENT
from tests.support.waiting import eventually


@dataclass
class Simulator:
    url: str
    process: asyncio.subprocess.Process

    async def kill(self) -> None:
        """Ends it as SIGKILL does: connections break without a word."""
        if self.process.returncode is None:
            self.process.kill()
        await self.process.wait()

    async def counter(self, name: str) -> float:
        """The sum of a counter's series on its metrics page."""
        async with aiohttp.ClientSession() as session, session.get(f"{self.url}/metrics") as response:
            page = await response.text()
        series = rf"^{re.escape(name)}{{[^}}]*}} (\S+)$"
        return sum(map(float, re.findall(series, page, re.MULTILINE)))

    async def answers(self) -> bool:
        try:
            async with aiohttp.ClientSession() as session, session.get(f"{self.url}/health") as response:
                return response.status == 200
        except aiohttp.ClientError:
            return False


@asynccontextmanager
async def simulator(*flags: str, inter_token_latency_ms: float = 2) -> AsyncIterator[Simulator]:
    """Runs a simulator that serves the deployment of `router_cluster`."""
    (port,) = free_ports(1)
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "nodeagent.engines.simulator",
        "--model", "org/model", "--served-model-name", DEPLOYMENT, "--port", str(port),
        "--inter-token-latency-ms", str(inter_token_latency_ms), *flags,
        stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.DEVNULL,
    )  # fmt: skip
    made = Simulator(f"http://127.0.0.1:{port}", process)
    try:
        await eventually(made.answers, timeout_seconds=30)
        yield made
    finally:
        await made.kill()
