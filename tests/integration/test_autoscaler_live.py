"""Autoscaling of simulated engines on a whole Millrace with two router workers, under real requests.

No request may fail while replicas come and go, and what sleeps is woken by the first request that comes.
"""

import asyncio
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import aiohttp
import pytest

from deploy.local.options import BUNDLED_MODEL
from tests.support.gateway import call, ready_replicas, wait_ready
from tests.support.load import steady_load
from tests.support.stack import LocalStack, local_stack
from tests.support.waiting import eventually

pytestmark = pytest.mark.integration
NAMESPACE, NAME = "team-ai", "busy"
ROUTER_WORKERS = 2
SLEEPY = {"min_replicas": 0, "max_replicas": 1, "cooldown_in_seconds": 1, "idle_timeout_seconds": 2}
# Long enough that whatever is sent at once is there before the engine.
STARTUP_SECONDS = 2.0


@dataclass(frozen=True)
class Answer:
    """What a client got."""

    status: int
    headers: Mapping[str, str]
    document: Any

    @property
    def why(self) -> str:
        """What the router says of its choice or its refusal."""
        return self.headers["x-millrace-reason"]


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalStack]:
    options = ("--engine=simulator", "--no-deployment", f"--router-workers={ROUTER_WORKERS}")
    with local_stack(tmp_path_factory.mktemp("stack"), *options, until="all processes run") as running:
        yield running


async def declare(stack: LocalStack, name: str, extra_args: dict[str, Any], **entry: Any) -> dict[str, str]:
    """Declares a deployment on simulators; returns its key as headers."""
    model = {
        "name": name,
        "model": str(BUNDLED_MODEL),
        "engine": "simulator",
        "extra_args": extra_args,
        **entry,
    }
    answer = await call(
        stack, "POST", "/v1/deployments", {"models": [model], "namespace": NAMESPACE}, expect=201
    )
    return {"authorization": f"Bearer {answer['deployments'][0]['apiKey']}"}


async def wanted(stack: LocalStack) -> int:
    deployment = await call(stack, "GET", f"/v1/deployments/{NAMESPACE}/{NAME}")
    return int(deployment["desired_replicas"])


async def ask(stack: LocalStack, headers: dict[str, str], model: str) -> Answer:
    """Asks the router once, on a connection of its own: either worker may get it."""
    body = {"model": model, "messages": [{"role": "user", "content": "Are you there?"}], "max_tokens": 4}
    url = f"{stack.description['router_url']}/v1/chat/completions"
    async with (
        aiohttp.ClientSession(headers=headers, trust_env=False) as session,
        session.post(url, json=body) as answer,
    ):
        return Answer(answer.status, answer.headers, await answer.json())


async def wait_asleep(stack: LocalStack, name: str) -> None:
    """Waits until neither a replica nor a process of it is left."""

    async def asleep() -> bool:
        deployment = await call(stack, "GET", f"/v1/deployments/{NAMESPACE}/{name}")
        return deployment["status"] == "stopped" and not deployment["replica_states"]

    await eventually(asleep, timeout_seconds=30, interval_seconds=0.1)
    await eventually(lambda: not stack.engine_pids(name))


async def test_one_to_three_to_one_without_a_failed_request(stack: LocalStack) -> None:
    quick = {
        "max_replicas": 3,
        "cooldown_out_seconds": 4,
        "cooldown_in_seconds": 3,
        # The queue alone decides here: routers remember the first tokens of the rush for a minute.
        "thresholds": {
            "waiting_requests_out": 1,
            "waiting_requests_in_period_seconds": 3,
            "first_token_p99_out_ms": 120_000,
            "first_token_p99_in_ms": 60_000,
        },
    }
    headers = await declare(stack, NAME, {"max_num_seqs": 2}, autoscale=quick)
    await wait_ready(stack, NAMESPACE, NAME, 1)
    url = stack.description["router_url"]
    async with steady_load(url, headers, model=NAME, clients=1, max_tokens=32) as calm:
        async with steady_load(url, headers, model=NAME, clients=12, max_tokens=64) as storm:
            await wait_ready(stack, NAMESPACE, NAME, 3)

            async def all_used() -> bool:
                serving = await ready_replicas(stack, NAMESPACE, NAME)
                return all(storm.last_use_of(each["replica"]) for each in serving)

            await eventually(all_used, timeout_seconds=20)
            await eventually(lambda: len(storm.outcomes) > 40, timeout_seconds=20)

        async def shrunk() -> bool:
            return await wanted(stack) == 1 and len(await ready_replicas(stack, NAMESPACE, NAME)) == 1

        await eventually(shrunk, timeout_seconds=40)
    assert not storm.failures
    assert not calm.failures
    deployment = await call(stack, "GET", f"/v1/deployments/{NAMESPACE}/{NAME}")
    assert deployment["replicas"] == 1, "the spec is the user's"
    assert deployment["autoscale_status"]["reason"] in {"ScaledIn", "Steady"}


async def test_it_sleeps_and_the_first_request_wakes_it(stack: LocalStack) -> None:
    headers = await declare(
        stack,
        "sleepy",
        {"startup_seconds": STARTUP_SECONDS},
        autoscale=SLEEPY,
        routing={"queue_requests_max": 2},
    )
    await wait_ready(stack, NAMESPACE, "sleepy", 1)
    assert (await ask(stack, headers, "sleepy")).status == 200
    assert stack.engine_pids("sleepy")
    await wait_asleep(stack, "sleepy")

    first = await ask(stack, headers, "sleepy")
    assert first.status == 200, first.document
    assert first.document["usage"]["completion_tokens"] == 4
    deployment = await call(stack, "GET", f"/v1/deployments/{NAMESPACE}/sleepy")
    assert deployment["autoscale_status"]["message"] == "0 -> 1: a request waits for it"
    await wait_asleep(stack, "sleepy")

    burst = await asyncio.gather(*(ask(stack, headers, "sleepy") for _ in range(12)))
    served = [each for each in burst if each.status == 200]
    refused = [each for each in burst if each.status != 200]
    # Each worker holds two; which worker gets which connection is the kernel's choice.
    assert 2 <= len(served) <= 2 * ROUTER_WORKERS
    assert {(each.status, each.why) for each in refused} == {(503, "start_queue_full")}
    # No worker has seen this engine start more than once, yet all know how long that takes.
    assert {STARTUP_SECONDS <= int(each.headers["Retry-After"]) <= 10 for each in refused} == {True}
    assert (await ask(stack, headers, "sleepy")).status == 200


async def test_a_fallback_serves_while_the_first_request_wakes_it(stack: LocalStack) -> None:
    await declare(stack, "small", {})
    headers = await declare(
        stack,
        "large",
        {"startup_seconds": STARTUP_SECONDS},
        autoscale=SLEEPY,
        routing={"fallback_deployment": "small"},
    )
    await wait_ready(stack, NAMESPACE, "small", 1)
    await wait_ready(stack, NAMESPACE, "large", 1)
    await wait_asleep(stack, "large")

    answer = await ask(stack, headers, "large")
    assert (answer.status, answer.why, answer.headers["x-millrace-deployment"]) == (200, "fallback", "small")

    async def serves_itself() -> bool:
        answer = await ask(stack, headers, "large")
        assert answer.status == 200, answer.document
        return answer.headers["x-millrace-endpoint"].startswith("large-")

    await eventually(serves_itself, timeout_seconds=20, interval_seconds=0.2)
