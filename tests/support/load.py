"""A steady load of requests on a router, and an exact account of what became of each."""

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import aiohttp

from core.tasks import cancel_and_wait


@dataclass
class Outcome:
    """One request: when it began and ended (monotonic seconds), and what came back."""

    began: float
    ended: float
    status: int
    endpoint: str
    error: str = ""

    @property
    def failed(self) -> bool:
        """True unless a whole completion came back."""
        return self.status != 200 or bool(self.error)


@dataclass
class Load:
    """The account of a load."""

    outcomes: list[Outcome] = field(default_factory=list)

    @property
    def failures(self) -> list[Outcome]:
        """Requests that did not get a whole completion."""
        return [outcome for outcome in self.outcomes if outcome.failed]

    def succeeded_since(self, moment: float) -> int:
        """Completions of requests that began after a moment."""
        return sum(1 for outcome in self.outcomes if not outcome.failed and outcome.began >= moment)

    def last_use_of(self, endpoint: str) -> float:
        """When the last request that this endpoint answered began; 0 when there was none."""
        return max((each.began for each in self.outcomes if each.endpoint == endpoint), default=0.0)


async def _client(
    session: aiohttp.ClientSession, url: str, body: Mapping[str, object], load: Load, pause: float
) -> None:
    while True:
        began = time.monotonic()
        status, endpoint, problem = 0, "", ""
        try:
            async with session.post(url, json=body) as answer:
                status = answer.status
                endpoint = answer.headers.get("x-millrace-endpoint", "")
                text = await answer.text()
                if status != 200:
                    problem = text[:500]
                elif '"choices"' not in text or '"error"' in text:
                    problem = text[-500:]
        except (aiohttp.ClientError, TimeoutError) as error:
            problem = repr(error)
        load.outcomes.append(Outcome(began, time.monotonic(), status, endpoint, problem))
        await asyncio.sleep(pause)


@asynccontextmanager
async def steady_load(
    router_url: str,
    headers: Mapping[str, str],
    *,
    model: str,
    clients: int = 4,
    max_tokens: int = 8,
    stream: bool = False,
    pause_seconds: float = 0.01,
) -> AsyncIterator[Load]:
    """Runs closed-loop clients in the background; the body sees their account grow."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": "What is Millrace?"}],
        "max_tokens": max_tokens,
        "temperature": 0,
        "stream": stream,
    }
    load = Load()
    timeout = aiohttp.ClientTimeout(total=60)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(
        headers=dict(headers), timeout=timeout, connector=connector, trust_env=False
    ) as session:
        tasks = [
            asyncio.create_task(
                _client(session, f"{router_url}/v1/chat/completions", body, load, pause_seconds),
                name=f"load-{index}",
            )
            for index in range(clients)
        ]
        try:
            yield load
        finally:
            await cancel_and_wait(*tasks)
