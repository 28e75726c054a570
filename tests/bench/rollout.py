"""Measures a rolling update of two replicas under load, one that succeeds and one that cannot, in one run.

    python -m tests.bench.rollout [--engine simulator|vllm] [--update good|broken|both]

The first update changes the context length; the second asks for an engine argument that does not exist, so
that no new replica starts: it has to be rolled back. Both run under load, and no request may fail. Engines
that start share the processors with those that serve: on real vLLM two clients pause between requests.
"""

import argparse
import asyncio
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.support.gateway import call, wait_ready
from tests.support.load import Load, steady_load
from tests.support.stack import LocalStack, local_stack
from tests.support.waiting import eventually

NAMESPACE, NAME = "default", "millrace-tiny"
PATH = f"/v1/deployments/{NAMESPACE}/{NAME}"


def _row(*cells: object) -> None:
    print("| " + " | ".join(str(cell) for cell in cells) + " |", flush=True)


async def _progressing(stack: LocalStack) -> tuple[str, dict[str, Any]]:
    deployment = await call(stack, "GET", PATH)
    found = [each for each in deployment["conditions"] if each["type"] == "Progressing"]
    # Before the loop has looked at a change, the condition speaks of the generation before.
    present = deployment["observed_generation"] == deployment["generation"]
    return (found[0]["reason"] if found and present else ""), deployment


async def update(
    stack: LocalStack,
    change: dict[str, Any],
    reason: str,
    *,
    timeout_seconds: float,
    clients: int,
    pause_seconds: float,
) -> tuple[Load, float, int, int, dict[str, Any]]:
    """Changes the deployment under load; returns the account, the seconds it took, and the bounds it kept.

    Args:
        stack: With two replicas that serve.
        change: Body of the PATCH.
        reason: Of the Progressing condition to wait for.
        timeout_seconds: Limit of the wait.
        clients: Of the load, each with one request at a time.
        pause_seconds: Of a client between two requests.
    """
    fewest, most = 99, 0
    url = stack.description["router_url"]
    async with steady_load(
        url, stack.user_headers(), model=NAME, stream=True, clients=clients, pause_seconds=pause_seconds
    ) as load:
        await eventually(lambda: len(load.outcomes) > 20, timeout_seconds=60)
        began = time.monotonic()
        await call(stack, "PATCH", PATH, change)

        async def settled() -> bool:
            nonlocal fewest, most
            found, deployment = await _progressing(stack)
            states = [each["state"] for each in deployment["replica_states"]]
            fewest, most = min(fewest, states.count("ready")), max(most, len(states))
            return found == reason and len(states) == 2

        try:
            await eventually(settled, timeout_seconds=timeout_seconds, interval_seconds=0.1)
        except (AssertionError, asyncio.CancelledError):
            # On a busy machine engines may start too slowly: what was seen until then is worth telling.
            so_far = f"{len(load.outcomes)} requests, {len(load.failures)} failed, fewest serving {fewest}"
            print(f"not settled after {time.monotonic() - began:.0f} s: {so_far}", flush=True)
            raise
        took_seconds = time.monotonic() - began
        after = time.monotonic()
        await eventually(lambda: load.succeeded_since(after) > 20, timeout_seconds=60)
    return load, took_seconds, fewest, most, (await _progressing(stack))[1]


_UPDATES: dict[str, tuple[str, dict[str, Any], str]] = {
    "good": ("another context length", {"max_model_len": 1024}, "Complete"),
    "broken": ("an argument that no engine knows", {"extra_args": {"no_such_argument": 1}}, "RolledBack"),
}


async def _run(stack: LocalStack, updates: list[str], *, real: bool) -> None:
    timeout_seconds = 280.0 if real else 60.0
    await wait_ready(stack, NAMESPACE, NAME, 2, timeout_seconds=timeout_seconds)
    _row("update of two replicas under load", "took", "requests", "failed", "fewest serving", "most replicas")
    _row("---", "---", "---", "---", "---", "---")
    deployment: dict[str, Any] = {}
    for title, wanted, reason in (_UPDATES[each] for each in updates):
        # Two successors at once: on few processors real engines start slowly one after the other.
        change = {**wanted, "rollout": {"max_surge": 2}} if real else wanted
        load, took_seconds, fewest, most, deployment = await update(
            stack,
            change,
            reason,
            timeout_seconds=timeout_seconds,
            clients=2 if real else 4,
            pause_seconds=0.5 if real else 0.01,
        )
        _row(title, f"{took_seconds:.1f} s", len(load.outcomes), len(load.failures), fewest, most)
        for failure in load.failures[:5]:
            print(f"failed: {failure.status} {failure.endpoint} {failure.error[:300]}")
    message = next(each["message"] for each in deployment["conditions"] if each["type"] == "Progressing")
    print(f"\nwhat the condition says: {message}")


def main() -> None:
    """Runs both updates."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--engine", choices=("simulator", "vllm"), default="simulator")
    parser.add_argument("--update", choices=("good", "broken", "both"), default="both")
    arguments = parser.parse_args()
    real = arguments.engine == "vllm"
    with (
        tempfile.TemporaryDirectory(prefix="millrace-bench-") as directory,
        local_stack(
            Path(directory), f"--engine={arguments.engine}", "--replicas=2", ready_seconds=400
        ) as stack,
    ):
        print(f"engine: {arguments.engine}; machine: {os.cpu_count()} processors\n")
        updates = ["good", "broken"] if arguments.update == "both" else [arguments.update]
        asyncio.run(_run(stack, updates, real=real))


if __name__ == "__main__":
    main()
