"""Calls of the HTTP gateway as an admin, for tests and benchmarks of a local stack."""

from typing import Any

import aiohttp

from tests.support.stack import LocalStack
from tests.support.waiting import eventually


async def call(
    stack: LocalStack, method: str, path: str, body: object = None, *, expect: int = 200
) -> dict[str, Any]:
    """Calls the gateway and returns the JSON answer; any other status fails with its text."""
    url = stack.description["gateway_url"] + path
    async with (
        aiohttp.ClientSession(headers=stack.admin_headers(), trust_env=False) as session,
        session.request(method, url, json=body) as answer,
    ):
        assert answer.status == expect, await answer.text()
        content: dict[str, Any] = await answer.json() if answer.content_type == "application/json" else {}
        return content


async def ready_replicas(stack: LocalStack, namespace: str, name: str) -> list[dict[str, Any]]:
    """Returns the replicas of a deployment that serve."""
    deployment = await call(stack, "GET", f"/v1/deployments/{namespace}/{name}")
    return [each for each in deployment["replica_states"] if each["state"] == "ready"]


async def wait_ready(
    stack: LocalStack, namespace: str, name: str, count: int, *, timeout_seconds: float = 30.0
) -> None:
    """Waits until exactly `count` replicas serve; a gateway that is away is waited for."""

    async def enough() -> bool:
        try:
            return len(await ready_replicas(stack, namespace, name)) == count
        except (aiohttp.ClientError, AssertionError):
            # Away, or back and still reading the store: it answers 503 until it has.
            return False

    await eventually(enough, timeout_seconds=timeout_seconds, interval_seconds=0.05)
