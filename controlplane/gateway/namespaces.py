"""Namespaces over HTTP: list, get, change quota and aliases."""

from aiohttp import web
from millrace.core.v1 import policy_pb2
from millrace.scheduler.v1 import scheduler_service_pb2 as messages

from controlplane.gateway import namespace_schema
from controlplane.gateway.bodies import flag_of, integer_of, query_of
from controlplane.gateway.requests import IDEMPOTENCY_HEADER, answer, body_of, call, etag_of

_ONE = "/v1/namespaces/{name}"


def add_routes(app: web.Application) -> None:
    """Adds the routes."""
    app.router.add_get("/v1/namespaces", _list, allow_head=False)
    app.router.add_get(_ONE, _get, allow_head=False)
    app.router.add_patch(_ONE, _update)


async def _list(request: web.Request) -> web.StreamResponse:
    query = query_of(request.query, ("pageSize", "pageToken"))
    response = await call(
        request,
        "ListNamespaces",
        messages.ListNamespacesRequest(
            page_size=integer_of(query, "pageSize"), page_token=query.get("pageToken", "")
        ),
    )
    return answer(
        namespace_schema.NamespacePage(
            namespaces=[_resource(each) for each in response.namespaces],
            next_page_token=response.next_page_token,
        )
    )


async def _get(request: web.Request) -> web.StreamResponse:
    message = messages.GetNamespaceRequest(name=request.match_info["name"])
    response = await call(request, "GetNamespace", message)
    return answer(_resource(response.namespace), etag=response.namespace.etag)


async def _update(request: web.Request) -> web.StreamResponse:
    query = query_of(request.query, ("validateOnly",))
    change = await body_of(request, namespace_schema.NamespaceChange)
    message = messages.UpdateNamespaceRequest(
        name=request.match_info["name"],
        spec=_spec(change),
        etag=etag_of(request),
        request_id=request.headers.get(IDEMPOTENCY_HEADER, ""),
        validate_only=flag_of(query, "validateOnly"),
    )
    message.update_mask.paths.extend(sorted(change.model_fields_set))
    response = await call(request, "UpdateNamespace", message)
    return answer(_resource(response.namespace), etag=response.namespace.etag)


def _spec(change: namespace_schema.NamespaceChange) -> policy_pb2.NamespaceSpec:
    spec = policy_pb2.NamespaceSpec()
    if change.quota is not None:
        spec.quota.SetInParent()
        if change.quota.devices is not None:
            spec.quota.devices = change.quota.devices
        if change.quota.replicas is not None:
            spec.quota.replicas = change.quota.replicas
    for alias in change.aliases or ():
        entry = spec.aliases.add(name=alias.name)
        for target in alias.targets:
            entry.targets.add(deployment=target.deployment, weight=target.weight)
    return spec


def _resource(namespace: policy_pb2.Namespace) -> namespace_schema.Namespace:
    spec, quota = namespace.spec, namespace.spec.quota
    return namespace_schema.Namespace(
        name=namespace.name,
        etag=namespace.etag,
        quota=namespace_schema.Quota(
            devices=quota.devices if quota.HasField("devices") else None,
            replicas=quota.replicas if quota.HasField("replicas") else None,
        )
        if spec.HasField("quota")
        else None,
        aliases=[
            namespace_schema.ModelAlias(
                name=alias.name,
                targets=[
                    namespace_schema.AliasTarget(deployment=each.deployment, weight=max(1, each.weight))
                    for each in alias.targets
                ],
            )
            for alias in spec.aliases
        ],
    )
