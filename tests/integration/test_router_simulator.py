"""The router before two simulators: processes that speak vLLM's HTTP."""

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import aiohttp
import openai
import pytest

from tests.support.ports import free_ports
from tests.support.router_cluster import DEPLOYMENT, cluster
from tests.support.waiting import eventually

pytestmark = pytest.mark.integration

MESSAGES: Any = [{"role": "user", "content": "Tell me about mills"}]


@asynccontextmanager
async def simulator(port: int) -> AsyncIterator[asyncio.subprocess.Process]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "nodeagent.engines.simulator",
        "--model", "org/model", "--served-model-name", DEPLOYMENT, "--port", str(port),
        "--inter-token-latency-ms", "2",
        stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.DEVNULL,
    )  # fmt: skip
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def _answers(url: str) -> bool:
    try:
        async with aiohttp.ClientSession() as session, session.get(f"{url}/health") as response:
            return response.status == 200
    except aiohttp.ClientError:
        return False


async def test_chat_stream_embeddings_and_a_killed_engine() -> None:
    ports = free_ports(2)
    urls = [f"http://127.0.0.1:{port}" for port in ports]
    async with AsyncExitStack() as stack:
        engines = [await stack.enter_async_context(simulator(port)) for port in ports]
        for url in urls:
            await eventually(lambda url=url: _answers(url), timeout_seconds=30)
        it = await stack.enter_async_context(cluster(strategy="least-pending", urls=urls))
        client = await stack.enter_async_context(
            openai.AsyncOpenAI(api_key=it.api_key, base_url=f"{it.url}/v1", max_retries=0)
        )
        chat = await client.chat.completions.create(model=DEPLOYMENT, messages=MESSAGES, max_tokens=8)
        assert chat.choices[0].message.content
        stream = await client.chat.completions.create(
            model=DEPLOYMENT, messages=MESSAGES, max_tokens=8, stream=True
        )
        parts = [part.choices[0].delta.content or "" async for part in stream if part.choices]
        assert "".join(parts) == chat.choices[0].message.content
        with pytest.raises(openai.BadRequestError):
            await client.chat.completions.create(model=DEPLOYMENT, messages=MESSAGES, max_tokens=-1)

        # Killed while idle: every request that follows is served by the other one.
        engines[0].kill()
        await engines[0].wait()
        for _ in range(10):
            again = await client.chat.completions.create(model=DEPLOYMENT, messages=MESSAGES, max_tokens=2)
            assert again.choices[0].message.content
        assert it.router.director.loads.total == 0
