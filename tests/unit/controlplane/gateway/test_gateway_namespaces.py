"""Namespaces and routing over HTTP: JSON in and out, errors by path."""

from collections.abc import AsyncIterator
from typing import Any

import pytest_asyncio
from aiohttp.test_utils import TestClient, TestServer

from controlplane.gateway.app import build_app
from controlplane.gateway.backend import Backend
from tests.support.api_harness import ADMIN_TOKEN, running_api

ROUTING: dict[str, Any] = {
    "strategy": "least-pending",
    "circuit_breaker": {"consecutive_failures": 3, "ejection_seconds": 2.5},
    "stream_continuation": True,
    "fallback_deployment": "small",
    "queue_requests_max": 0,
    "queue_timeout_seconds": 12.0,
}


@pytest_asyncio.fixture
async def http() -> AsyncIterator[Any]:
    async with running_api() as api:
        backend = Backend(api.target)
        app = build_app(backend, ready=lambda: api.view.synced)
        headers = {"Authorization": f"Bearer {ADMIN_TOKEN}"}
        async with TestClient(TestServer(app), headers=headers) as client:
            yield client
        await backend.close()


def _model(name: str, **more: Any) -> dict[str, Any]:
    return {"name": name, "model": "any", "engine": "simulator", **more}


async def test_routing_comes_back_as_sent(http: Any) -> None:
    body = {"namespace": "team", "models": [_model("chat", routing=ROUTING), _model("small")]}
    async with http.post("/v1/deployments", json=body) as response:
        assert response.status == 201, await response.text()
    async with http.get("/v1/deployments/team/chat") as response:
        # A text has no presence in the contract, so that the ones left out come back empty.
        assert (await response.json())["routing"] == ROUTING
    async with http.patch("/v1/deployments/team/chat", json={"routing": None}) as response:
        assert (await response.json())["routing"] is None
    async with http.patch("/v1/deployments/team/chat", json={"routing": {"strategie": "x"}}) as response:
        assert response.status == 400
        (field,) = (await response.json())["error"]["fields"]
        assert field["field"] == "routing.strategie"
        assert "did you mean `strategy`" in field["description"]


async def test_a_namespace_in_and_out(http: Any) -> None:
    body = {"namespace": "team", "models": [_model("old"), _model("new")]}
    async with http.post("/v1/deployments", json=body) as response:
        assert response.status == 201
    async with http.get("/v1/namespaces/team") as response:
        assert await response.json() == {"name": "team", "etag": "0", "quota": None, "aliases": []}
    alias = {"name": "chat", "targets": [{"deployment": "old", "weight": 4}, {"deployment": "new"}]}
    change = {"aliases": [alias], "quota": {"devices": 0}}
    async with http.patch("/v1/namespaces/team", json=change, headers={"If-Match": '"0"'}) as response:
        content = await response.json()
        assert response.status == 200, content
        assert response.headers["ETag"] == f'"{content["etag"]}"'
    assert content["quota"] == {"devices": 0, "replicas": None}
    assert content["aliases"][0]["targets"][1] == {"deployment": "new", "weight": 1}
    async with http.patch("/v1/namespaces/team", json={"quota": None}) as response:
        content = await response.json()
        assert content["quota"] is None
        assert len(content["aliases"]) == 1
    async with http.get("/v1/namespaces") as response:
        page = await response.json()
    assert (page["namespaces"], page["nextPageToken"]) == ([content], "")
    async with http.patch("/v1/namespaces/team", json={}, headers={"If-Match": '"0"'}) as response:
        assert response.status == 412
    wrong = {"aliases": [{"name": "chat", "targets": [{"deployment": "none"}]}]}
    async with http.patch("/v1/namespaces/team", json=wrong) as response:
        assert response.status == 400
        (field,) = (await response.json())["error"]["fields"]
        assert field["field"] == "aliases[0].targets[0].deployment"
