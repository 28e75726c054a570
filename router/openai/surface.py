"""The OpenAI routes: what is served, and how a request becomes a call of the director.

In come HTTP requests, out go answers in OpenAI's shape, errors included: unknown routes, wrong methods,
malformed bodies. Models are listed from the view; no engine is asked.
"""

from typing import Any

import orjson
from aiohttp import hdrs, web

from router.call import Call
from router.director import Director
from router.downstream import Downstream, Incoming
from router.openai import errors
from router.openai.body import ParsedBody, parse_body
from router.openai.errors import Reason, Refusal
from router.openai.http import AiohttpDownstream, AiohttpRequest
from router.picking.contract import RequestContext
from router.record import RECORD, RequestRecord
from router.view.view import Alias, Deployment, Tenant
from router.wire.headers import RequestHeaders

INFERENCE_ROUTES = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings")
SESSION_HEADER = "x-session-id"
MODELS_ROUTE = "/v1/models"
MODEL_ROUTE = "/v1/models/{model}"

SUPPORTED = (
    *(f"POST {route}" for route in INFERENCE_ROUTES),
    f"GET {MODELS_ROUTE}",
    f"GET {MODEL_ROUTE}",
    "GET /health",
    "GET /metrics",
)


class OpenAISurface:
    """Handlers of the OpenAI routes."""

    def __init__(self, director: Director, *, body_bytes_max: int, body_timeout_seconds: float) -> None:
        """Takes the bounds of a request's body: bytes, and seconds until it has come completely."""
        self._director = director
        self._body_bytes_max = body_bytes_max
        self._body_timeout_seconds = body_timeout_seconds

    def add_routes(self, router: web.UrlDispatcher) -> None:
        """Registers the routes."""
        for route in INFERENCE_ROUTES:
            router.add_post(route, self._infer)
        router.add_get(MODELS_ROUTE, self.list_models, allow_head=False)
        # Declared model ids hold slashes.
        router.add_get("/v1/models/{model:.+}", self.get_model, allow_head=False)

    async def infer(self, incoming: Incoming, record: RequestRecord, downstream: Downstream) -> None:
        """Serves chat completions, completions and embeddings: one way for all.

        Raises:
            Refusal: Nothing has been written to the client, and this is what it should hear.
        """
        headers = incoming.headers
        tenant = self._director.authenticate(headers.get("authorization"), record)
        with self._director.admit():
            body = await self._read_body(incoming)
            parsed = parse_body(body)
            record.model, record.stream = parsed.model, parsed.stream
            session = _session(headers, parsed)
            deployment = self._director.resolve(tenant, parsed.model, session)
            record.deployment = deployment.name
            context = RequestContext(
                request_id=record.request_id,
                route=record.route,
                namespace=deployment.namespace,
                deployment=deployment.name,
                model=parsed.model,
                stream=parsed.stream,
                body=body,
                prompt=self._director.candidates.selectors.of(deployment).read_prompt(
                    parsed.document,
                    deployment.endpoints,
                    namespace=deployment.namespace,
                    deployment=deployment.name,
                ),
                session=session,
            )
            await self._director.forward(
                Call(
                    path=incoming.path,
                    headers=headers,
                    downstream=downstream,
                    record=record,
                    context=context,
                    parsed=parsed,
                )
            )

    async def _infer(self, request: web.Request) -> web.StreamResponse:
        downstream = AiohttpDownstream(request)
        return await downstream.run(self.infer(AiohttpRequest(request), request[RECORD], downstream))

    async def list_models(self, request: web.Request) -> web.StreamResponse:
        """Lists the deployments that the key may use, then the aliases."""
        tenant = self._director.authenticate(request.headers.get(hdrs.AUTHORIZATION), request[RECORD])
        aliases = (each for name, each in sorted(tenant.aliases.items()) if name not in tenant.deployments)
        data = [
            *(_model(each) for each in tenant.deployments.values()),
            *(_alias(each, tenant) for each in aliases),
        ]
        return _json({"object": "list", "data": data})

    async def get_model(self, request: web.Request) -> web.StreamResponse:
        """Shows one deployment or alias that the key may use."""
        record = request[RECORD]
        tenant = self._director.authenticate(request.headers.get(hdrs.AUTHORIZATION), record)
        record.model = request.match_info["model"]
        found = tenant.resolve(record.model)
        if isinstance(found, Alias):
            return _json(_alias(found, tenant))
        return _json(_model(self._director.resolve(tenant, record.model)))

    async def _read_body(self, incoming: Incoming) -> bytes:
        """Reads the whole body within its bounds."""
        encoding = incoming.headers.get("content-encoding", "identity").lower()
        if encoding != "identity":
            raise errors.body_encoded(encoding)
        try:
            body = await incoming.read(
                bytes_max=self._body_bytes_max, timeout_seconds=self._body_timeout_seconds
            )
        except TimeoutError as error:
            raise errors.body_timeout(self._body_timeout_seconds) from error
        if body is None:
            raise errors.body_too_large(self._body_bytes_max)
        return body


def _session(headers: RequestHeaders, parsed: ParsedBody) -> str:
    """Returns what the client calls its session; empty for none."""
    named = headers.get(SESSION_HEADER)
    if named:
        return named
    user = parsed.document.get("user")
    return user if isinstance(user, str) else ""


def _model(deployment: Deployment) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "id": deployment.name,
        "object": "model",
        "owned_by": deployment.namespace,
        "root": deployment.declared_model,
    }
    if deployment.create_time_seconds is not None:
        entry["created"] = deployment.create_time_seconds
    return entry


def _alias(alias: Alias, tenant: Tenant) -> dict[str, Any]:
    """Shows an alias as a model; `root` is where it leads, absent where that is to several."""
    entry: dict[str, Any] = {"id": alias.name, "object": "model", "owned_by": tenant.name}
    if len(alias.targets) == 1:
        entry["root"] = alias.targets[0].deployment
    return entry


def _json(document: dict[str, Any]) -> web.Response:
    return web.Response(body=orjson.dumps(document), content_type="application/json")


def refusal_response(refusal: Refusal) -> web.Response:
    """Renders a refusal."""
    response = web.Response(
        status=refusal.status,
        body=refusal.body(),
        content_type="application/json",
        headers={errors.REASON_HEADER: refusal.why.value, **refusal.headers},
    )
    if refusal.headers.get(hdrs.CONNECTION) == "close":
        response.force_close()
    return response


def refusal_of_http(error: web.HTTPException, request: web.Request) -> Refusal:
    """Translates what the HTTP server itself refuses."""
    match error:
        case web.HTTPMethodNotAllowed():
            return errors.method_not_allowed(
                request.method, request.path, tuple(sorted(error.allowed_methods))
            )
        case web.HTTPNotFound():
            return errors.route_unknown(request.method, request.path, SUPPORTED)
        case _:
            return Refusal(error.status, Reason.REQUEST_INVALID, error.reason)
