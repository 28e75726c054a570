"""Nodes over HTTP: list, get, label and taint, cordon, uncordon, drain."""

from aiohttp import web
from google.protobuf.field_mask_pb2 import FieldMask
from millrace.scheduler.v1 import scheduler_service_pb2 as messages

from controlplane.gateway import render, schema
from controlplane.gateway.bodies import flag_of, integer_of, query_of
from controlplane.gateway.placement import node_change
from controlplane.gateway.requests import IDEMPOTENCY_HEADER, answer, body_of, call, etag_of


def add_routes(app: web.Application) -> None:
    """Adds the routes."""
    app.router.add_get("/v1/nodes", _list, allow_head=False)
    app.router.add_get("/v1/nodes/{name}", _get, allow_head=False)
    app.router.add_patch("/v1/nodes/{name}", _update)
    app.router.add_post("/v1/nodes/{name}/cordon", _cordon)
    app.router.add_post("/v1/nodes/{name}/uncordon", _uncordon)
    app.router.add_post("/v1/nodes/{name}/drain", _drain)


async def _list(request: web.Request) -> web.StreamResponse:
    query = query_of(request.query, ("pageSize", "pageToken"))
    response = await call(
        request,
        "ListNodes",
        messages.ListNodesRequest(
            page_size=integer_of(query, "pageSize"), page_token=query.get("pageToken", "")
        ),
    )
    return answer(
        schema.NodePage(
            nodes=[render.node(each) for each in response.nodes],
            next_page_token=response.next_page_token,
            resource_version=response.resource_version,
        )
    )


async def _get(request: web.Request) -> web.StreamResponse:
    message = messages.GetNodeRequest(name=request.match_info["name"])
    response = await call(request, "GetNode", message)
    return answer(render.node(response.node), etag=response.node.etag)


async def _update(request: web.Request) -> web.StreamResponse:
    query = query_of(request.query, ("validateOnly",))
    spec, fields = node_change(await body_of(request, schema.NodeChange))
    response = await call(
        request,
        "UpdateNode",
        messages.UpdateNodeRequest(
            name=request.match_info["name"],
            spec=spec,
            update_mask=FieldMask(paths=fields),
            etag=etag_of(request),
            request_id=request.headers.get(IDEMPOTENCY_HEADER, ""),
            validate_only=flag_of(query, "validateOnly"),
        ),
    )
    return answer(render.node(response.node), etag=response.node.etag)


async def _cordon(request: web.Request) -> web.StreamResponse:
    return await _set_cordoned(request, cordoned=True)


async def _uncordon(request: web.Request) -> web.StreamResponse:
    return await _set_cordoned(request, cordoned=False)


async def _set_cordoned(request: web.Request, *, cordoned: bool) -> web.StreamResponse:
    query = query_of(request.query, ("validateOnly",))
    response = await call(
        request,
        "CordonNode",
        messages.CordonNodeRequest(
            name=request.match_info["name"],
            cordoned=cordoned,
            etag=etag_of(request),
            request_id=request.headers.get(IDEMPOTENCY_HEADER, ""),
            validate_only=flag_of(query, "validateOnly"),
        ),
    )
    return answer(render.node(response.node), etag=response.node.etag)


async def _drain(request: web.Request) -> web.StreamResponse:
    query = query_of(request.query, ("validateOnly",))
    response = await call(
        request,
        "DrainNode",
        messages.DrainNodeRequest(
            name=request.match_info["name"],
            etag=etag_of(request),
            request_id=request.headers.get(IDEMPOTENCY_HEADER, ""),
            validate_only=flag_of(query, "validateOnly"),
        ),
    )
    return answer(
        schema.DrainAnswer(node=render.node(response.node), moving=list(response.moving)),
        etag=response.node.etag,
    )
