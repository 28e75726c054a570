"""Measures what the spine promises, on this machine, in one run, and prints a table in Markdown.

    python -m tests.bench [--declarations N] [--engine simulator|vllm]

Declared to ready: from the declaration to the first served token, less the engine's own start-up. Fail-over:
an engine is killed under load with two replicas. Restarts: each process is killed under load.
"""

import argparse
import asyncio
import itertools
import os
import signal
import statistics
import tempfile
import time
from datetime import datetime
from functools import partial
from pathlib import Path

import aiohttp

from deploy.local.options import BUNDLED_MODEL
from tests.support.failover import kill_under_load
from tests.support.gateway import call, ready_replicas, wait_ready
from tests.support.load import steady_load
from tests.support.stack import LocalStack, local_stack
from tests.support.waiting import eventually

NAMESPACE, NAME = "default", "millrace-tiny"


def _row(*cells: object) -> None:
    print("| " + " | ".join(str(cell) for cell in cells) + " |", flush=True)


async def _declare_once(stack: LocalStack, index: int) -> tuple[float, float, float]:
    """Returns declared-to-ready without the engine, the engine's start, and declared-to-served, in ms."""
    name = f"bench-{index}"
    request = {
        "models": [{"name": name, "model": str(BUNDLED_MODEL), "engine": "simulator"}],
        "namespace": "bench",
    }
    began = time.monotonic()
    answer = await call(stack, "POST", "/v1/deployments", request, expect=201)
    key = answer["deployments"][0]["apiKey"]
    body = {"model": name, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}
    url = stack.description["router_url"] + "/v1/chat/completions"
    async with aiohttp.ClientSession(headers={"authorization": f"Bearer {key}"}, trust_env=False) as session:
        while True:
            async with session.post(url, json=body) as response:
                if response.status == 200:
                    break
            await asyncio.sleep(0.002)
    served_ms = (time.monotonic() - began) * 1000
    deployment = await call(stack, "GET", f"/v1/deployments/bench/{name}")
    (replica,) = deployment["replica_states"]
    declared = datetime.fromisoformat(deployment["create_time"])
    ready = datetime.fromisoformat(replica["ready_time"])
    engine_ms = float(replica["engine_start_ms"])
    await call(stack, "DELETE", f"/v1/deployments/bench/{name}", expect=204)
    return (ready - declared).total_seconds() * 1000 - engine_ms, engine_ms, served_ms


async def _declarations(stack: LocalStack, count: int) -> None:
    samples = [await _declare_once(stack, index) for index in range(count)]
    print(f"\nDeclared to ready, simulator, {count} declarations one after the other\n")
    _row("figure, ms", "p50", "p90", "max")
    _row("---", "---", "---", "---")
    for title, values in zip(
        ("declared -> ready less the engine's start-up", "the engine's own start-up", "declared -> served"),
        zip(*samples, strict=True),
        strict=True,
    ):
        deciles = statistics.quantiles(values, n=10)
        _row(title, f"{statistics.median(values):.0f}", f"{deciles[8]:.0f}", f"{max(values):.0f}")


async def _failover(stack: LocalStack, *, stream: bool) -> None:
    await wait_ready(stack, NAMESPACE, NAME, 2, timeout_seconds=240)
    account = await kill_under_load(
        stack.description["router_url"],
        stack.user_headers(),
        model=NAME,
        replicas=partial(ready_replicas, stack, NAMESPACE, NAME),
        router_log=stack.directory / "logs" / "router.log",
        replaced_within_seconds=240,
        stream=stream,
    )
    print(f"\nkill -9 of an engine under load, two replicas, {'streams' if stream else 'whole answers'}\n")
    _row("figure", "value")
    _row("---", "---")
    _row("requests", account.requests)
    _row("failed, inside the killed engine", len(account.inside))
    _row("failed, anywhere else", len(account.others))
    _row("router last tries it after", f"{account.last_use_seconds * 1000:.0f} ms")
    _row("replacement assigned after", f"{account.assigned_seconds * 1000:.0f} ms")
    _row("replacement serves after", f"{account.serves_seconds * 1000:.0f} ms")


async def _restarts(stack: LocalStack) -> None:
    print("\nkill -9 of each process under load\n")
    _row("killed", "requests", "failed", "longest gap without a completion", "engines kept their pids")
    _row("---", "---", "---", "---", "---")
    for name in ("controlplane", "nodeagent", "etcd", "router"):
        await wait_ready(stack, NAMESPACE, NAME, 2, timeout_seconds=240)
        engines, before = stack.engine_pids(), stack.description["pids"][name]
        async with steady_load(stack.description["router_url"], stack.user_headers(), model=NAME) as load:
            await eventually(lambda load=load: len(load.outcomes) > 20, timeout_seconds=20)
            os.kill(before, signal.SIGKILL)
            await eventually(
                lambda name=name, before=before: stack.description["pids"][name] != before,
                timeout_seconds=30,
            )
            await wait_ready(stack, NAMESPACE, NAME, 2, timeout_seconds=240)
            returned = time.monotonic()
            await eventually(
                lambda load=load, returned=returned: load.succeeded_since(returned) > 100,
                timeout_seconds=60,
            )
        ends = sorted(each.ended for each in load.outcomes if not each.failed)
        gap = max(later - earlier for earlier, later in itertools.pairwise(ends))
        kept = stack.engine_pids() == engines
        _row(name, len(load.outcomes), len(load.failures), f"{gap * 1000:.0f} ms", kept)


async def _run(stack: LocalStack, declarations: int, engine: str) -> None:
    if engine == "simulator":
        await _declarations(stack, declarations)
    await _failover(stack, stream=False)
    await _failover(stack, stream=True)
    await _restarts(stack)


def main() -> None:
    """Runs everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--declarations", type=int, default=20)
    parser.add_argument("--engine", choices=("simulator", "vllm"), default="simulator")
    arguments = parser.parse_args()
    with (
        tempfile.TemporaryDirectory(prefix="millrace-bench-") as directory,
        local_stack(
            Path(directory), f"--engine={arguments.engine}", "--replicas=2", ready_seconds=400
        ) as stack,
    ):
        print(f"engine: {arguments.engine}; machine: {os.cpu_count()} processors")
        asyncio.run(_run(stack, arguments.declarations, arguments.engine))


if __name__ == "__main__":
    main()
