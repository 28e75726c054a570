"""Saturation learned from real engines' metrics: two simulators with small batches, asked for more."""

import asyncio
import sys
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import aiohttp
import pytest
from millrace.core.v1 import stats_pb2, types_pb2

from core.clock import SystemClock, to_timestamp
from core.store import keys
from core.tasks import cancel_and_wait
from nodeagent.engines.metrics_text import VLLM_NAMES, parse_stats
from tests.support.ports import free_ports
from tests.support.router_cluster import DEPLOYMENT, NAMESPACE, Cluster, cluster
from tests.support.waiting import eventually

pytestmark = pytest.mark.integration

BATCH = 4
SAMPLE_SECONDS = 0.1


@asynccontextmanager
async def _simulator(port: int) -> AsyncIterator[str]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "nodeagent.engines.simulator",
        "--model", "org/model", "--served-model-name", DEPLOYMENT, "--port", str(port),
        "--inter-token-latency-ms", "5", "--max-num-seqs", str(BATCH),
        stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.DEVNULL,
    )  # fmt: skip
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def _answers(client: aiohttp.ClientSession, url: str) -> bool:
    try:
        async with client.get(f"{url}/health") as response:
            return response.status == 200
    except aiohttp.ClientError:
        return False


async def _sample(it: Cluster, replica: str, url: str, seen: list[stats_pb2.EngineStats]) -> None:
    """Writes an engine's statistics to the store, as its agent does, faster."""
    while True:
        async with it.client.get(f"{url}/metrics") as response:
            stats = parse_stats(await response.text(), VLLM_NAMES)
        stats.replica, stats.incarnation = replica, "run-1"
        stats.sample_time.CopyFrom(to_timestamp(SystemClock().now()))
        seen.append(stats)
        await it.put(keys.stats(NAMESPACE, DEPLOYMENT, replica), stats)
        await asyncio.sleep(SAMPLE_SECONDS)


async def test_requests_wait_in_the_router_and_not_in_the_engines() -> None:
    async with AsyncExitStack() as stack:
        urls = [await stack.enter_async_context(_simulator(port)) for port in free_ports(2)]
        it = await stack.enter_async_context(cluster(strategy="default", urls=urls))
        for url in urls:
            await eventually(lambda url=url: _answers(it.client, url), timeout_seconds=30)
        seen: list[list[stats_pb2.EngineStats]] = [[], []]
        samplers = [
            asyncio.create_task(_sample(it, f"chat-{at}", url, seen[at]), name="sampler")
            for at, url in enumerate(urls)
        ]
        try:
            fast = await it.make_key(NAMESPACE, types_pb2.TIER_FAST)
            await eventually(lambda: len(it.router.source.view.api_keys) == 2)
            limits = it.router.director.candidates.gate.saturation.limits
            ended: Counter[str] = Counter()
            enough = asyncio.Event()

            async def keep_asking(name: str, key: str) -> None:
                body = {"model": DEPLOYMENT, "prompt": name * 50, "max_tokens": 20, "ignore_eos": True}
                while not enough.is_set():
                    headers = {"Authorization": f"Bearer {key}"}
                    async with it.client.post(
                        f"{it.url}/v1/completions", json=body, headers=headers
                    ) as response:
                        assert response.status == 200, await response.text()
                        await response.read()
                    ended[name[0]] += 1

            askers = [
                *(asyncio.create_task(keep_asking(f"base {n}", it.api_key)) for n in range(12)),
                *(asyncio.create_task(keep_asking(f"fast {n}", fast)) for n in range(12)),
            ]
            # A batch of four and one more, learned of both.
            await eventually(lambda: limits == {"chat-0": 5, "chat-1": 5}, timeout_seconds=20)
            for each in seen:
                each.clear()
            ended.clear()
            await eventually(lambda: sum(ended.values()) > 150, timeout_seconds=30)
            enough.set()
            await asyncio.gather(*askers)
            for each in seen:
                # What was inside before the limits were known has gone after the first samples.
                assert max(stats.waiting_requests for stats in each[5:]) <= 2
                assert max(stats.running_requests for stats in each[5:]) == BATCH
            # Three of four places are in order, the fourth is the oldest's.
            assert ended["f"] > 1.5 * ended["b"] > 0
        finally:
            await cancel_and_wait(*samplers)
        assert it.router.director.loads.total == 0
        assert it.router.director.candidates.gate.waiting() == (0, 0)
