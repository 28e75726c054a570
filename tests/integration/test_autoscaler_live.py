"""Autoscaling of simulated engines on a whole Millrace: no request may fail while replicas come and go."""

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from millrace.state.v1 import records_pb2

from core.store import Delete, Put, keys
from core.store.etcd import EtcdStore
from core.store.etcd_settings import EtcdSettings
from deploy.local.options import BUNDLED_MODEL
from tests.support.gateway import call, ready_replicas, wait_ready
from tests.support.load import steady_load
from tests.support.stack import LocalStack, local_stack
from tests.support.waiting import eventually

pytestmark = pytest.mark.integration
NAMESPACE, NAME = "team-ai", "busy"


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalStack]:
    with local_stack(tmp_path_factory.mktemp("stack"), "--engine=simulator", "--replicas=1") as running:
        yield running


async def declare(stack: LocalStack, autoscale: dict[str, Any]) -> dict[str, str]:
    """Declares a deployment whose engines take two requests at once; returns its key as headers."""
    model = {
        "name": NAME,
        "model": str(BUNDLED_MODEL),
        "engine": "simulator",
        "extra_args": {"max_num_seqs": 2},
        "autoscale": autoscale,
    }
    answer = await call(
        stack, "POST", "/v1/deployments", {"models": [model], "namespace": NAMESPACE}, expect=201
    )
    return {"authorization": f"Bearer {answer['deployments'][0]['apiKey']}"}


async def wanted(stack: LocalStack) -> int:
    deployment = await call(stack, "GET", f"/v1/deployments/{NAMESPACE}/{NAME}")
    return int(deployment["desired_replicas"])


@asynccontextmanager
async def parked_request(stack: LocalStack) -> AsyncIterator[None]:
    """Says what a router says that holds a request for a deployment without endpoints."""
    store = EtcdStore(EtcdSettings(endpoints=tuple(stack.description["etcd_endpoints"])))
    record = records_pb2.RouterRecord(router_id="test")
    record.demand.add(namespace=NAMESPACE, deployment=NAME, parked_requests=1)
    key = keys.live_router("test")
    try:
        await store.commit([Put(key, record.SerializeToString())])
        yield
    finally:
        await store.commit([Delete(key)])
        await store.close()


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
    headers = await declare(stack, quick)
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


async def test_it_sleeps_and_a_parked_request_wakes_it(stack: LocalStack) -> None:
    sleepy = {"min_replicas": 0, "max_replicas": 2, "cooldown_in_seconds": 1, "idle_timeout_seconds": 3}
    await call(stack, "PATCH", f"/v1/deployments/{NAMESPACE}/{NAME}", {"autoscale": sleepy})

    async def asleep() -> bool:
        deployment = await call(stack, "GET", f"/v1/deployments/{NAMESPACE}/{NAME}")
        return deployment["status"] == "stopped" and not deployment["replica_states"]

    await eventually(asleep, timeout_seconds=30)
    async with parked_request(stack):
        await wait_ready(stack, NAMESPACE, NAME, 1)
    deployment = await call(stack, "GET", f"/v1/deployments/{NAMESPACE}/{NAME}")
    assert deployment["autoscale_status"]["message"] == "0 -> 1: a request waits for it"
