"""The gateway: R1's JSON in and out, errors that name fields, versions, OpenAPI."""

import io
import json
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import pytest
import pytest_asyncio
from aiohttp import ClientResponse
from aiohttp.test_utils import TestClient, TestServer

from controlplane.gateway.app import BODY_BYTES_MAX, build_app
from controlplane.gateway.backend import Backend
from controlplane.gateway.openapi import openapi_document
from core.store import keys
from tests.support.api_harness import ADMIN_TOKEN, FLEET_TOKEN, VIEWER_TOKEN, ApiHarness, running_api

R1: dict[str, Any] = {
    "models": [
        {
            "name": "tiny",
            "model": "/models/tiny",
            "engine": "vllm",
            "quantization": "none",
            "max_model_len": 1024,
            "replicas": 1,
            "extra_args": {},
        }
    ],
    "namespace": "team-ai",
    "metadata": {"userId": "user-001", "teamId": "team-001", "source": "cli"},
}


@dataclass
class Http:
    """A gateway and a client of it."""

    api: ApiHarness
    client: Any

    async def request(
        self, method: str, path: str, body: Any = None, *, token: str = ADMIN_TOKEN, **more: Any
    ) -> ClientResponse:
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        headers.update(more.pop("headers", {}))
        data = body if body is None or isinstance(body, (bytes, str, io.BytesIO)) else json.dumps(body)
        response: ClientResponse = await self.client.request(method, path, data=data, headers=headers, **more)
        return response

    async def refused(self, status: int, method: str, path: str, body: Any = None, **more: Any) -> Any:
        response = await self.request(method, path, body, **more)
        content = await response.json()
        assert response.status == status, content
        assert content["error"]["requestId"] == response.headers["x-request-id"]
        return content["error"]


@pytest_asyncio.fixture
async def http() -> AsyncIterator[Http]:
    async with running_api() as api:
        backend = Backend(api.target)
        app = build_app(backend, ready=lambda: api.view.synced)
        async with TestClient(TestServer(app)) as client:
            yield Http(api, client)
        await backend.close()


def model(**changes: Any) -> dict[str, Any]:
    return {"models": [{"name": "a", "model": "/models/tiny", **changes}]}


async def test_declaration_of_the_request_format(http: Http) -> None:
    response = await http.request("POST", "/v1/deployments", R1)
    content = await response.json()
    assert response.status == 201, content
    assert set(content) == {"namespace", "deployments"}
    (entry,) = content["deployments"]
    assert set(entry) == {"name", "model", "endpoint", "apiKey", "status", "watch", "sizing"}
    assert content["namespace"] == "team-ai"
    assert entry["endpoint"].endswith("/v1")
    assert entry["apiKey"].startswith("sk-")
    assert entry["status"] == "pending"
    assert entry["watch"].startswith("ws://")
    assert entry["sizing"]["max_model_len"] == 1024
    assert sum(term["bytes"] for term in entry["sizing"]["terms"]) == entry["sizing"]["total_bytes"]


async def test_metadata_and_arguments_come_back_as_sent(http: Http) -> None:
    body = model(engine="simulator", extra_args={"seed": 7, "rate": 0.5, "flags": ["a", None, True]})
    body["metadata"] = {"userId": "user-001", "nested": {"count": 3}}
    body["namespace"] = "team"
    assert (await http.request("POST", "/v1/deployments", body)).status == 201
    content = await (await http.request("GET", "/v1/deployments/team/a")).json()
    assert content["metadata"] == body["metadata"]
    assert content["extra_args"] == body["models"][0]["extra_args"]
    assert json.dumps(content["extra_args"]["seed"]) == "7"
    assert content["max_model_len"] is None


BAD_BODIES: list[tuple[str, Any, str, str]] = [
    ("malformed", '{"models": [', "body", "line 1, column"),
    ("empty", "", "body", "is empty"),
    ("not an object", "[]", "body", "a JSON object"),
    ("not UTF-8", b"\xff", "body", "UTF-8"),
    ("NaN", '{"models": [], "metadata": {"a": NaN}}', "body", "NaN"),
    ("duplicate key", '{"namespace": "a", "namespace": "b"}', "body", "twice"),
    ("half a surrogate pair", '{"namespace": "\\ud800"}', "body", "surrogate"),
    ("deep", "[" * 200_000, "body", ""),
    ("deep but valid", '{"models":' + "[" * 100 + "]" * 100 + "}", "body", "deeper"),
    ("huge number", '{"models": ' + "9" * 5000 + "}", "body", ""),
    ("no models", {}, "models", "required"),
    ("empty models", {"models": []}, "models", "at least one"),
    ("unknown at the top", {**model(), "namspace": "x"}, "namspace", "did you mean `namespace`"),
    (
        "unknown in a model",
        model(max_model_length=3),
        "models[0].max_model_length",
        "did you mean `max_model_len`",
    ),
    ("hardware", model(gpus=3), "models[0].gpus", "known are name, model"),
    ("wrong engine", model(engine="vlm"), "models[0].engine", "'vllm'"),
    ("wrong quantization", model(quantization="int4"), "models[0].quantization", "'awq'"),
    ("known engine", model(engine="tgi"), "models[0].engine", "engine `tgi` is known"),
    ("text for a number", model(replicas="2"), "models[0].replicas", "is text; a whole number"),
    ("fraction", model(replicas=1.5), "models[0].replicas", "whole number"),
    ("boolean", model(replicas=True), "models[0].replicas", "whole number"),
    ("absurd replicas", model(replicas=10**12), "models[0].replicas", "at most 1000"),
    ("absurd context", model(max_model_len=10**12), "models[0].max_model_len", "at most"),
    ("empty name", model(name=""), "models[0].name", "is empty"),
    ("missing path", model(model="/none"), "models[0].model", "does not exist"),
    ("arguments as list", model(extra_args=[]), "models[0].extra_args", "an object"),
    ("duplicate names", {"models": model()["models"] * 2}, "models[1].name", "already the name"),
    ("namespace", {**model(), "namespace": "../x"}, "namespace", "no valid namespace"),
]


@pytest.mark.parametrize(
    ("body", "field", "part"), [row[1:] for row in BAD_BODIES], ids=[row[0] for row in BAD_BODIES]
)
async def test_bad_bodies_name_the_field(http: Http, body: Any, field: str, part: str) -> None:
    error = await http.refused(400, "POST", "/v1/deployments", body)
    assert error["code"] == "INVALID_ARGUMENT"
    assert error["reason"] in {"ERROR_REASON_FIELD_INVALID", "ERROR_REASON_MODEL_NOT_FOUND"}
    assert [each["field"] for each in error["fields"]] == [field]
    assert part in error["fields"][0]["description"]
    assert not (await http.api.store.list(keys.ROOT + "spec/")).items


async def test_every_wrong_field_is_named_at_once(http: Http) -> None:
    body = {"models": [{"name": 3, "foo": 1, "engine": "x"}], "bar": 2}
    error = await http.refused(400, "POST", "/v1/deployments", body)
    assert {each["field"] for each in error["fields"]} == {
        "bar", "models[0].name", "models[0].model", "models[0].engine", "models[0].foo",
    }  # fmt: skip


async def test_model_that_does_not_fit_names_the_model(http: Http) -> None:
    await http.api.add_node(memory_bytes=8 << 30)
    error = await http.refused(400, "POST", "/v1/deployments", model(model="/models/huge"))
    assert error["code"] == "FAILED_PRECONDITION"
    assert error["reason"] == "ERROR_REASON_MODEL_DOES_NOT_FIT"
    assert error["fields"][0]["field"] == "models[0].model"


async def test_too_large_body(http: Http) -> None:
    error = await http.refused(413, "POST", "/v1/deployments", io.BytesIO(b" " * (BODY_BYTES_MAX + 1)))
    assert "1048576" in error["message"]


async def test_taken_name_is_a_conflict(http: Http) -> None:
    await http.request("POST", "/v1/deployments", R1)
    error = await http.refused(409, "POST", "/v1/deployments", R1)
    assert error["code"] == "ALREADY_EXISTS"
    assert error["fields"][0]["field"] == "models[0].name"


async def test_idempotency_key_answers_the_same_with_fresh_keys(http: Http) -> None:
    headers = {"Idempotency-Key": str(uuid.uuid4())}
    first = await (await http.request("POST", "/v1/deployments", model(), headers=headers)).json()
    second = await (await http.request("POST", "/v1/deployments", model(), headers=headers)).json()
    assert first["namespace"] == second["namespace"]
    assert first["deployments"][0]["apiKey"] != second["deployments"][0]["apiKey"]


@pytest.mark.parametrize(
    ("token", "status", "code"),
    [
        ("", 401, "UNAUTHENTICATED"),
        ("wrong", 401, "UNAUTHENTICATED"),
        (FLEET_TOKEN, 403, "PERMISSION_DENIED"),
        (VIEWER_TOKEN, 403, "PERMISSION_DENIED"),
    ],
)
async def test_default_deny(http: Http, token: str, status: int, code: str) -> None:
    error = await http.refused(status, "POST", "/v1/deployments", R1, token=token)
    assert error["code"] == code
    if token != VIEWER_TOKEN:
        for path in ("/v1/deployments", "/v1/nodes", "/v1/deployments/a/b", "/v1/deployments/a/b/watch"):
            assert (await http.request("GET", path, token=token)).status == status
    assert not (await http.api.store.list(keys.ROOT + "spec/")).items


async def test_open_paths_need_no_token(http: Http) -> None:
    for path in ("/health", "/metrics", "/openapi.json"):
        assert (await http.request("GET", path, token="")).status == 200


async def test_unknown_paths_and_methods_are_json(http: Http) -> None:
    assert (await http.refused(404, "GET", "/v2/x"))["code"] == "NOT_FOUND"
    error = await http.refused(405, "PUT", "/v1/deployments", R1)
    assert error["code"] == "METHOD_NOT_ALLOWED"
    assert "POST" in error["message"]


async def test_get_list_change_delete(http: Http) -> None:
    await http.request("POST", "/v1/deployments", R1)
    response = await http.request("GET", "/v1/deployments/team-ai/tiny")
    etag = response.headers["ETag"]
    assert (await response.json())["status"] == "pending"
    changed = await http.request(
        "PATCH",
        "/v1/deployments/team-ai/tiny",
        {"replicas": 3, "max_model_len": None},
        headers={"If-Match": etag},
    )
    content = await changed.json()
    assert changed.status == 200, content
    assert (content["replicas"], content["max_model_len"], content["generation"]) == (3, None, 2)
    error = await http.refused(
        412, "PATCH", "/v1/deployments/team-ai/tiny", {"replicas": 4}, headers={"If-Match": etag}
    )
    assert error["reason"] == "ERROR_REASON_ETAG_MISMATCH"
    page = await (await http.request("GET", "/v1/deployments?namespace=team-ai&pageSize=1")).json()
    assert [each["name"] for each in page["deployments"]] == ["tiny"]
    assert page["nextPageToken"] == ""
    assert (await http.request("DELETE", "/v1/deployments/team-ai/tiny")).status == 204
    assert (await http.refused(404, "DELETE", "/v1/deployments/team-ai/tiny"))["code"] == "NOT_FOUND"


async def test_queries_are_strict(http: Http) -> None:
    error = await http.refused(400, "GET", "/v1/deployments?page_size=3")
    assert error["fields"][0]["field"] == "page_size"
    assert "pageSize" in error["fields"][0]["description"]
    assert (await http.refused(400, "GET", "/v1/deployments?pageSize=x"))["fields"][0]["field"] == "pageSize"
    error = await http.refused(400, "GET", "/v1/deployments?pageSize=-1")
    assert error["fields"][0]["field"] == "pageSize"


async def test_patch_names_unknown_fields(http: Http) -> None:
    error = await http.refused(400, "PATCH", "/v1/deployments/team-ai/tiny", {"replica": 1})
    assert "did you mean `replicas`" in error["fields"][0]["description"]


async def test_nodes(http: Http) -> None:
    await http.api.add_node("node-1")
    page = await (await http.request("GET", "/v1/nodes")).json()
    assert [each["name"] for each in page["nodes"]] == ["node-1"]
    assert (await http.refused(404, "GET", "/v1/nodes/none"))["code"] == "NOT_FOUND"
    assert (await (await http.request("POST", "/v1/nodes/node-1/cordon")).json())["cordoned"] is True
    drained = await (await http.request("POST", "/v1/nodes/node-1/drain")).json()
    assert (drained["node"]["draining"], drained["moving"]) == (True, [])
    node = await (await http.request("POST", "/v1/nodes/node-1/uncordon")).json()
    assert (node["cordoned"], node["draining"]) == (False, False)


async def test_explain(http: Http) -> None:
    await http.api.add_node("node-1")
    await http.request("POST", "/v1/deployments", R1)
    content = await (await http.request("GET", "/v1/deployments/team-ai/tiny/explain")).json()
    assert [each["node"] for each in content["nodes"]] == ["node-1"]
    assert content["summary"]


async def test_request_id_is_returned(http: Http) -> None:
    response = await http.request("GET", "/health", headers={"x-request-id": "mine-1"})
    assert response.headers["x-request-id"] == "mine-1"


async def test_unavailable_store_is_a_503_with_retry_after(http: Http) -> None:
    http.api.store.set_available(False)
    response = await http.request("POST", "/v1/deployments", R1)
    assert response.status == 503
    assert response.headers["Retry-After"]
    http.api.store.set_available(True)


async def test_openapi_lists_every_route(http: Http) -> None:
    document = await (await http.request("GET", "/openapi.json", token="")).json()
    assert document["openapi"] == "3.1.0"
    routes = {
        (route.method.lower(), route.resource.canonical)
        for route in http.client.app.router.routes()
        if route.resource is not None and route.method != "HEAD"
    }
    listed = {(method, path) for path, methods in document["paths"].items() for method in methods}
    assert listed == routes


def test_openapi_references_resolve() -> None:
    text = json.dumps(openapi_document())
    schemas = openapi_document()["components"]["schemas"]
    for reference in {part.split('"')[0] for part in text.split("#/components/schemas/")[1:]}:
        assert reference in schemas
    declared = schemas["DeclaredModel"]
    assert declared["additionalProperties"] is False
    assert set(declared["required"]) == {"name", "model"}


async def test_placement_goes_in_and_comes_out(http: Http) -> None:
    await http.api.add_node()
    placement = {
        "node_selector": {"zone": "north"},
        "tolerations": [{"key": "dedicated", "value": "lab"}],
        "device_pins": [{"node": "node-1", "device_ids": ["cpu"]}],
    }
    body = model(engine="simulator", priority=8, placement=placement) | {"namespace": "team"}
    assert (await http.request("POST", "/v1/deployments", body)).status == 201
    content = await (await http.request("GET", "/v1/deployments/team/a")).json()
    assert (content["priority"], content["placement"]) == (8, placement)
    changed = await http.request("PATCH", "/v1/deployments/team/a", {"priority": 3, "placement": None})
    content = await changed.json()
    assert (content["priority"], content["placement"]) == (3, None)
    wrong = model(placement={"node_selectors": {}}) | {"namespace": "team"}
    error = await http.refused(400, "POST", "/v1/deployments", wrong)
    assert error["fields"][0]["field"] == "models[0].placement.node_selectors"
    assert "did you mean `node_selector`" in error["fields"][0]["description"]


async def test_a_plan_over_http_changes_nothing(http: Http) -> None:
    await http.api.add_node()
    before = (await http.api.store.list(keys.ROOT)).revision
    response = await http.request("POST", "/v1/plan", {"models": R1["models"]}, token=VIEWER_TOKEN)
    content = await response.json()
    assert response.status == 200, content
    (planned,) = content["deployments"]
    assert [each["node"] for each in planned["replicas"]] == ["node-1"]
    assert planned["replicas"][0]["devices"][0]["memory_bytes"] == planned["sizing"]["total_bytes"]
    assert (await http.api.store.list(keys.ROOT)).revision == before


async def test_labels_and_taints_over_http(http: Http) -> None:
    await http.api.add_node()
    change = {"labels": {"zone": "north"}, "taints": [{"key": "maintenance", "effect": "no_execute"}]}
    response = await http.request("PATCH", "/v1/nodes/node-1", change)
    content = await response.json()
    assert response.status == 200, content
    assert content["labels"] == {"zone": "north"}
    assert content["taints"] == [{"key": "maintenance", "value": "", "effect": "no_execute"}]
    cleared = await (await http.request("PATCH", "/v1/nodes/node-1", {"taints": []})).json()
    assert (cleared["labels"], cleared["taints"]) == ({"zone": "north"}, [])
