"""The OpenAPI 3.1 document, made of the same models that check the requests.

Out comes a plain dictionary. It lists every path with its answers and its errors; a unit test holds it
against the application's routes.
"""

from functools import cache
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from controlplane.gateway import namespace_schema, schema
from core import VERSION

_NAMESPACE = "namespace"
_PATHS_OF_ONE = (_NAMESPACE, "name")
_WRITE_ERRORS = (400, 401, 403, 404, 409, 412, 413, 503)
_READ_ERRORS = (400, 401, 403, 404, 503)
_LIST_ERRORS = (*_READ_ERRORS, 410)
_ERRORS = {
    400: "A field is wrong, or no node could ever hold the model.",
    401: "No credential, or an unknown one.",
    403: "The role may not do this.",
    404: "It does not exist.",
    409: "It exists already, or changed meanwhile.",
    410: "The page token's snapshot is gone; list again.",
    412: "The version of If-Match is not the current one.",
    413: "The body is larger than 1 MiB.",
    503: "The store cannot be reached, or the control plane is starting; retry.",
}
_ANSWERS: tuple[type[BaseModel], ...] = (
    schema.DeclarationAnswer,
    schema.Deployment,
    schema.DeploymentPage,
    schema.Explanation,
    schema.Node,
    schema.NodePage,
    schema.DrainAnswer,
    schema.PlanAnswer,
    namespace_schema.Namespace,
    namespace_schema.NamespacePage,
    schema.ErrorAnswer,
)
_BODIES: tuple[type[BaseModel], ...] = (
    schema.Declaration,
    schema.DeploymentChange,
    schema.PlanBody,
    schema.NodeChange,
    namespace_schema.NamespaceChange,
)


@cache
def openapi_document() -> dict[str, Any]:
    """Returns the document; callers must not change it."""
    _, definitions = models_json_schema(
        [*((each, "serialization") for each in _ANSWERS), *((each, "validation") for each in _BODIES)],
        ref_template="#/components/schemas/{model}",
    )
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Millrace",
            "version": VERSION,
            "description": "Declare a model, get an OpenAI-compatible endpoint.",
        },
        "security": [{"bearer": []}],
        "paths": _paths(),
        "components": {
            "securitySchemes": {"bearer": {"type": "http", "scheme": "bearer"}},
            "schemas": definitions["$defs"],
        },
    }


def _paths() -> dict[str, Any]:
    one = "/v1/deployments/{namespace}/{name}"
    matching, retry, dry_run = _write_parameters()
    pages = [
        _query("pageSize", "0 means 50; at most 1000.", {"type": "integer"}),
        _query("pageToken", "`nextPageToken` of the page before.", {"type": "string"}),
    ]
    return {
        "/v1/deployments": {
            "post": _operation(
                "declareDeployments", "Declare models: all of them, or none.",
                answer=schema.DeclarationAnswer, status=201, body=schema.Declaration,
                parameters=[retry, dry_run], errors=_WRITE_ERRORS,
            ),
            "get": _operation(
                "listDeployments", "List deployments.", answer=schema.DeploymentPage,
                parameters=[_query("namespace", "Tenant; all where absent.", {"type": "string"}), *pages],
                errors=_LIST_ERRORS,
            ),
        },
        one: {
            "get": _operation("getDeployment", "Get a deployment.", answer=schema.Deployment,
                              path=_PATHS_OF_ONE),
            "patch": _operation(
                "updateDeployment", "Change fields; running replicas are replaced one by one.",
                answer=schema.Deployment, body=schema.DeploymentChange, path=_PATHS_OF_ONE,
                parameters=[matching, retry, dry_run], errors=_WRITE_ERRORS,
            ),
            "delete": _operation(
                "deleteDeployment", "Delete a deployment and its keys.", answer=None, status=204,
                path=_PATHS_OF_ONE, parameters=[matching, retry, dry_run], errors=_WRITE_ERRORS,
            ),
        },
        f"{one}/restart": {
            "post": _operation(
                "restartDeployment",
                "Replace every replica by a new one of the same spec; also after a roll back.",
                answer=schema.Deployment, path=_PATHS_OF_ONE, parameters=[matching, retry, dry_run],
                errors=_WRITE_ERRORS,
            ),
        },
        f"{one}/explain": {
            "get": _operation("explainDeployment", "Why replicas are where they are, or nowhere.",
                              answer=schema.Explanation, path=_PATHS_OF_ONE),
        },
        f"{one}/watch": {
            "get": _operation(
                "watchDeployment",
                "WebSocket: JSON messages whose `type` is status, event, log, snapshot_end or error. "
                "Browsers send the credential as subprotocol `bearer.<token>` beside `millrace.v1`.",
                answer=None, status=101, path=_PATHS_OF_ONE,
            ),
        },
        "/v1/plan": {
            "post": _operation(
                "planDeployments", "What a declaration would take, whom it would pre-empt, and why.",
                answer=schema.PlanAnswer, body=schema.PlanBody, errors=(400, 401, 403, 413, 503),
            ),
        },
        **_namespace_paths(pages),
        **_node_paths(pages),
        "/health": {"get": _open("health", "200 while serving, 503 while starting.", "application/json")},
        "/metrics": {"get": _open("metrics", "Prometheus metrics.", "text/plain")},
        "/openapi.json": {"get": _open("openapi", "This document.", "application/json")},
    }  # fmt: skip


def _namespace_paths(pages: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "/v1/namespaces": {
            "get": _operation(
                "listNamespaces",
                "List namespaces of which something was said.",
                answer=namespace_schema.NamespacePage,
                parameters=pages,
                errors=_LIST_ERRORS,
            ),
        },
        "/v1/namespaces/{name}": {
            "get": _operation(
                "getNamespace", "Get a namespace.", answer=namespace_schema.Namespace, path=("name",)
            ),
            "patch": _operation(
                "updateNamespace",
                "Replace quota or aliases.",
                answer=namespace_schema.Namespace,
                body=namespace_schema.NamespaceChange,
                path=("name",),
                parameters=_write_parameters(),
                errors=_WRITE_ERRORS,
            ),
        },
    }


def _node_paths(pages: list[dict[str, Any]]) -> dict[str, Any]:
    node_write: dict[str, Any] = {"parameters": _write_parameters(), "errors": _WRITE_ERRORS}
    return {
        "/v1/nodes": {
            "get": _operation(
                "listNodes", "List nodes.", answer=schema.NodePage, parameters=pages, errors=_LIST_ERRORS
            ),
        },
        "/v1/nodes/{name}": {
            "get": _operation("getNode", "Get a node.", answer=schema.Node, path=("name",)),
            "patch": _operation(
                "updateNode",
                "Replace the operator's labels or taints.",
                answer=schema.Node,
                body=schema.NodeChange,
                path=("name",),
                **node_write,
            ),
        },
        "/v1/nodes/{name}/cordon": {
            "post": _operation(
                "cordonNode", "Take no new replicas.", answer=schema.Node, path=("name",), **node_write
            ),
        },
        "/v1/nodes/{name}/uncordon": {
            "post": _operation(
                "uncordonNode",
                "Take cordon and drain back.",
                answer=schema.Node,
                path=("name",),
                **node_write,
            ),
        },
        "/v1/nodes/{name}/drain": {
            "post": _operation(
                "drainNode",
                "Move the node's replicas away.",
                answer=schema.DrainAnswer,
                path=("name",),
                **node_write,
            ),
        },
    }


def _write_parameters() -> list[dict[str, Any]]:
    return [
        _header("If-Match", "Version that the change is based on."),
        _header("Idempotency-Key", "UUID that makes a retry safe."),
        _query("validateOnly", "Check and size, and change nothing.", {"type": "boolean"}),
    ]


def _operation(
    identifier: str,
    summary: str,
    *,
    answer: type[BaseModel] | None,
    status: int = 200,
    body: type[BaseModel] | None = None,
    path: tuple[str, ...] = (),
    parameters: list[dict[str, Any]] | None = None,
    errors: tuple[int, ...] = _READ_ERRORS,
) -> dict[str, Any]:
    described = {200: "OK", 201: "Created", 204: "Deleted", 101: "Switching to WebSocket"}[status]
    success: dict[str, Any] = {"description": described}
    if answer is not None:
        success["content"] = _json(answer)
    operation: dict[str, Any] = {
        "operationId": identifier,
        "summary": summary,
        "parameters": [
            *({"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in path),
            *(parameters or ()),
        ],
        "responses": {
            str(status): success,
            **{
                str(code): {"description": _ERRORS[code], "content": _json(schema.ErrorAnswer)}
                for code in errors
            },
        },
    }
    if body is not None:
        operation["requestBody"] = {"required": True, "content": _json(body)}
    return operation


def _open(identifier: str, summary: str, content_type: str) -> dict[str, Any]:
    return {
        "operationId": identifier,
        "summary": summary,
        "security": [],
        "responses": {"200": {"description": "OK", "content": {content_type: {}}}},
    }


def _json(model: type[BaseModel]) -> dict[str, Any]:
    return {"application/json": {"schema": {"$ref": f"#/components/schemas/{model.__name__}"}}}


def _query(name: str, description: str, schema_of_it: dict[str, Any]) -> dict[str, Any]:
    return {"name": name, "in": "query", "description": description, "schema": schema_of_it}


def _header(name: str, description: str) -> dict[str, Any]:
    return {"name": name, "in": "header", "description": description, "schema": {"type": "string"}}
