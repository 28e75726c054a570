"""Deployments over HTTP: declare, list, get, change, restart, delete, explain."""

from aiohttp import web
from millrace.scheduler.v1 import scheduler_service_pb2 as messages

from controlplane.gateway import render, schema
from controlplane.gateway.bodies import flag_of, integer_of, query_of
from controlplane.gateway.placement import planned
from controlplane.gateway.requests import IDEMPOTENCY_HEADER, answer, body_of, call, etag_of

_ALL = "/v1/deployments"
_ONE = "/v1/deployments/{namespace}/{name}"


def add_routes(app: web.Application) -> None:
    """Adds the routes."""
    app.router.add_post(_ALL, _declare)
    app.router.add_get(_ALL, _list, allow_head=False)
    app.router.add_get(_ONE, _get, allow_head=False)
    app.router.add_patch(_ONE, _update)
    app.router.add_delete(_ONE, _delete)
    app.router.add_post(_ONE + "/restart", _restart)
    app.router.add_get(_ONE + "/explain", _explain, allow_head=False)
    app.router.add_post("/v1/plan", _plan)


async def _declare(request: web.Request) -> web.StreamResponse:
    query = query_of(request.query, ("validateOnly",))
    validate_only = flag_of(query, "validateOnly")
    declaration = await body_of(request, schema.Declaration)
    message = render.declare_request(
        declaration, request_id=request.headers.get(IDEMPOTENCY_HEADER, ""), validate_only=validate_only
    )
    response = await call(request, "DeclareDeployments", message)
    return answer(render.declaration_answer(response), status=200 if validate_only else 201)


async def _plan(request: web.Request) -> web.StreamResponse:
    body = await body_of(request, schema.PlanBody)
    declaration = schema.Declaration(models=body.models, namespace=body.namespace)
    declared = render.declare_request(declaration, request_id="", validate_only=True)
    message = messages.PlanDeploymentsRequest(models=declared.models, namespace=declared.namespace)
    response = await call(request, "PlanDeployments", message)
    found = [planned(each, render.sizing(each.sizing)) for each in response.deployments]
    return answer(schema.PlanAnswer(deployments=found))


async def _list(request: web.Request) -> web.StreamResponse:
    query = query_of(request.query, ("namespace", "pageSize", "pageToken"))
    response = await call(
        request,
        "ListDeployments",
        messages.ListDeploymentsRequest(
            namespace=query.get("namespace", ""),
            page_size=integer_of(query, "pageSize"),
            page_token=query.get("pageToken", ""),
        ),
    )
    return answer(
        schema.DeploymentPage(
            deployments=[render.deployment(each) for each in response.deployments],
            next_page_token=response.next_page_token,
            resource_version=response.resource_version,
        )
    )


async def _get(request: web.Request) -> web.StreamResponse:
    response = await call(
        request,
        "GetDeployment",
        messages.GetDeploymentRequest(
            namespace=request.match_info["namespace"], name=request.match_info["name"]
        ),
    )
    return answer(render.deployment(response.deployment), etag=response.deployment.etag)


async def _update(request: web.Request) -> web.StreamResponse:
    query = query_of(request.query, ("validateOnly",))
    change = await body_of(request, schema.DeploymentChange)
    message = render.update_request(
        change,
        namespace=request.match_info["namespace"],
        name=request.match_info["name"],
        etag=etag_of(request),
        request_id=request.headers.get(IDEMPOTENCY_HEADER, ""),
    )
    message.validate_only = flag_of(query, "validateOnly")
    response = await call(request, "UpdateDeployment", message)
    return answer(render.deployment(response.deployment), etag=response.deployment.etag)


async def _restart(request: web.Request) -> web.StreamResponse:
    query = query_of(request.query, ("validateOnly",))
    response = await call(
        request,
        "RestartDeployment",
        messages.RestartDeploymentRequest(
            namespace=request.match_info["namespace"],
            name=request.match_info["name"],
            etag=etag_of(request),
            request_id=request.headers.get(IDEMPOTENCY_HEADER, ""),
            validate_only=flag_of(query, "validateOnly"),
        ),
    )
    return answer(render.deployment(response.deployment), etag=response.deployment.etag)


async def _delete(request: web.Request) -> web.StreamResponse:
    query = query_of(request.query, ("validateOnly",))
    await call(
        request,
        "DeleteDeployment",
        messages.DeleteDeploymentRequest(
            namespace=request.match_info["namespace"],
            name=request.match_info["name"],
            etag=etag_of(request),
            request_id=request.headers.get(IDEMPOTENCY_HEADER, ""),
            validate_only=flag_of(query, "validateOnly"),
        ),
    )
    return web.Response(status=204)


async def _explain(request: web.Request) -> web.StreamResponse:
    response = await call(
        request,
        "ExplainDeployment",
        messages.ExplainDeploymentRequest(
            namespace=request.match_info["namespace"], name=request.match_info["name"]
        ),
    )
    return answer(render.explanation(response))
