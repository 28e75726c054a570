"""The router before two simulators: processes that speak vLLM's HTTP."""

from contextlib import AsyncExitStack
from typing import Any

import openai
import pytest

from tests.support.router_cluster import DEPLOYMENT, cluster
from tests.support.simulators import simulator

pytestmark = pytest.mark.integration

MESSAGES: Any = [{"role": "user", "content": "Tell me about mills"}]


async def test_chat_stream_embeddings_and_a_killed_engine() -> None:
    async with AsyncExitStack() as stack:
        engines = [await stack.enter_async_context(simulator()) for _ in range(2)]
        urls = [engine.url for engine in engines]
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
        await engines[0].kill()
        for _ in range(10):
            again = await client.chat.completions.create(model=DEPLOYMENT, messages=MESSAGES, max_tokens=2)
            assert again.choices[0].message.content
        assert it.router.director.loads.total == 0
