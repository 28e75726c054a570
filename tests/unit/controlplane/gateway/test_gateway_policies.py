"""Policies over HTTP: the same JSON in and out, mistakes named, null takes them away."""

from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio
from aiohttp.test_utils import TestClient, TestServer

from controlplane.gateway.app import build_app
from controlplane.gateway.backend import Backend
from controlplane.gateway.policies import (
    Autoscale,
    Rollout,
    autoscale_message,
    autoscale_of,
    rollout_message,
    rollout_of,
)
from tests.support.api_harness import ADMIN_TOKEN, running_api

AUTOSCALE: dict[str, Any] = {
    "min_replicas": 0,
    "max_replicas": 4,
    "thresholds": {
        "utilization_out_ratio": 0.7,
        "waiting_requests_out": 5,
        "waiting_requests_in_period_seconds": 60.5,
    },
    "cooldown_out_seconds": 30,
    "idle_timeout_seconds": 600,
    "cron_windows": [
        {
            "days": "mon-fri",
            "start_time": "08:00",
            "end_time": "18:00",
            "time_zone": "Europe/Berlin",
            "replicas": 2,
            "warm_up_seconds": 1800,
        }
    ],
}
ROLLOUT: dict[str, Any] = {
    "max_surge": 2,
    "max_unavailable": 0,
    "progress_deadline_seconds": 120,
    "drain_timeout_seconds": 5,
}
PATH = "/v1/deployments/team-ai/tiny"


def test_policies_come_back_as_they_went_in() -> None:
    autoscale = Autoscale.model_validate(AUTOSCALE)
    assert autoscale_of(autoscale_message(autoscale)) == autoscale
    rollout = Rollout.model_validate(ROLLOUT)
    assert rollout_of(rollout_message(rollout)) == rollout
    assert rollout_message(rollout).HasField("max_unavailable")
    assert not rollout_message(Rollout()).HasField("max_surge")


@pytest_asyncio.fixture
async def client() -> AsyncIterator[Any]:
    async with running_api() as api:
        backend = Backend(api.target)
        app = build_app(backend, ready=lambda: api.view.synced)
        headers = {"Authorization": f"Bearer {ADMIN_TOKEN}"}
        async with TestClient(TestServer(app), headers=headers) as client:
            yield client
        await backend.close()


async def declare(client: Any, **policies: Any) -> Any:
    model = {"name": "tiny", "model": "any", "engine": "simulator", **policies}
    return await client.post("/v1/deployments", json={"models": [model], "namespace": "team-ai"})


async def test_declared_read_changed_and_taken_away(client: Any) -> None:
    assert (await declare(client, autoscale=AUTOSCALE, rollout=ROLLOUT)).status == 201
    found = await (await client.get(PATH)).json()
    assert {key: value for key, value in found["rollout"].items() if value is not None} == ROLLOUT
    assert found["autoscale"]["thresholds"]["waiting_requests_out"] == 5
    assert found["autoscale"]["cron_windows"] == AUTOSCALE["cron_windows"]
    assert found["autoscale"]["cooldown_in_seconds"] is None
    assert (found["autoscale_status"], found["rollout_status"]) == (None, None)
    changed = await (await client.patch(PATH, json={"autoscale": {"max_replicas": 2}})).json()
    assert (changed["autoscale"]["max_replicas"], changed["autoscale"]["cron_windows"]) == (2, None)
    fixed = await (await client.patch(PATH, json={"autoscale": None})).json()
    assert fixed["autoscale"] is None
    assert fixed["rollout"] is not None
    restarted = await client.post(PATH + "/restart")
    assert restarted.status == 200
    assert (await restarted.json())["generation"] == 4


@pytest.mark.parametrize(
    ("policies", "field", "text"),
    [
        ({"autoscale": {}}, "models[0].autoscale.max_replicas", "is missing"),
        ({"autoscale": {"max_replicas": 2, "max": 3}}, "models[0].autoscale.max", "known are min_replicas"),
        ({"autoscale": {"max_replicas": "2"}}, "models[0].autoscale.max_replicas", "a whole number"),
        (
            {"autoscale": {"max_replicas": 2, "cron_windows": [{**AUTOSCALE["cron_windows"][0], "zone": 1}]}},
            "models[0].autoscale.cron_windows[0].zone",
            "did you mean `time_zone`?",
        ),
        (
            {"autoscale": {"max_replicas": 2, "min_replicas": 3}},
            "models[0].autoscale.min_replicas",
            "between",
        ),
        ({"rollout": {"max_surge": -1}}, "models[0].rollout.max_surge", "too small"),
        (
            {"rollout": {"max_surge": 0, "max_unavailable": 0}},
            "models[0].rollout.max_unavailable",
            "at least 1",
        ),
    ],
)
async def test_mistakes_are_named(client: Any, policies: Any, field: str, text: str) -> None:
    response = await declare(client, **policies)
    assert response.status == 400
    (error,) = (await response.json())["error"]["fields"]
    assert error["field"] == field
    assert text in error["description"]
