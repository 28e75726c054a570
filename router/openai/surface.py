"""The OpenAI routes: what is served, and how a request becomes a call of the director.

In come HTTP requests, out go answers in the shape of their route (mostly OpenAI's), errors included: unknown
routes, wrong methods, malformed bodies. Models are listed from the view; no engine is asked.
"""

from typing import Any

import orjson
from aiohttp import hdrs, web

from core.identity import bearer_token, hash_secret
from router.call import Call
from router.director import Director
from router.downstream import Downstream, Incoming
from router.openai import errors
from router.openai.body import BareBody, ParsedBody, parse_body
from router.openai.errors import Reason, Refusal
from router.openai.http import AiohttpDownstream, AiohttpRequest
from router.openai.multipart import is_multipart, parse_multipart
from router.openai.response_ids import endpoint_of_response
from router.openai.routes import INFERENCE_ROUTES, RESPONSE_CANCEL_ROUTE, RESPONSE_ROUTE, shape_of
from router.openai.shapes import refusal_body
from router.picking.contract import RequestContext
from router.prefix.prompt import NO_PROMPT
from router.record import RECORD, RequestRecord
from router.view.view import Alias, Deployment, Tenant
from router.wire.headers import RequestHeaders

SESSION_HEADER = "x-session-id"
MODELS_ROUTE = "/v1/models"
MODEL_ROUTE = "/v1/models/{model}"

SUPPORTED = (
    *(f"POST {route}" for route in INFERENCE_ROUTES),
    f"GET {RESPONSE_ROUTE}",
    f"POST {RESPONSE_CANCEL_ROUTE}",
    f"GET {MODELS_ROUTE}",
    f"GET {MODEL_ROUTE}",
    "GET /health",
    "GET /metrics",
)


class OpenAISurface:
    """Handlers of the OpenAI routes.

    Attributes:
        body_bytes_max: Of a request.
    """

    def __init__(self, director: Director, *, body_bytes_max: int, body_timeout_seconds: float) -> None:
        """Takes the bounds of a request's body: bytes, and seconds until it has come completely."""
        self._director = director
        self.body_bytes_max = body_bytes_max
        self._body_timeout_seconds = body_timeout_seconds

    def add_routes(self, router: web.UrlDispatcher) -> None:
        """Registers the routes."""
        for route in INFERENCE_ROUTES:
            router.add_post(route, self._infer)
        router.add_get(RESPONSE_ROUTE, self._look_up, allow_head=False)
        router.add_post(RESPONSE_CANCEL_ROUTE, self._look_up)
        router.add_get(MODELS_ROUTE, self.list_models, allow_head=False)
        # Declared model ids hold slashes.
        router.add_get("/v1/models/{model:.+}", self.get_model, allow_head=False)

    async def infer(self, incoming: Incoming, record: RequestRecord, downstream: Downstream) -> None:
        """Serves every route that goes to engines: one way for all.

        Raises:
            Refusal: Nothing has been written to the client, and this is what it should hear.
        """
        tenant = self.authenticate(incoming.headers, record)
        with self._director.admit():
            body = await self._read_body(incoming)
            call = self.understand(incoming, tenant, body, record, downstream)
            await self._director.forward(call, self._director.begin(call))

    def authenticate(self, headers: RequestHeaders, record: RequestRecord) -> Tenant:
        """Finds out whose request it is.

        Raises:
            Refusal: Nobody's, or nobody can tell yet.
        """
        key_hash = headers.key_hash
        if key_hash is None:
            token = bearer_token(_credentials(headers))
            key_hash = headers.key_hash = "" if token is None else hash_secret(token)
        return self._director.authenticate(key_hash, record)

    def understand(
        self,
        incoming: Incoming,
        tenant: Tenant,
        body: bytes,
        record: RequestRecord,
        downstream: Downstream,
    ) -> Call:
        """Reads a request whose body is there.

        Raises:
            Refusal: It makes no sense, or names no model that the tenant has.
        """
        headers = incoming.headers
        content_type = headers.get("content-type", "")
        if INFERENCE_ROUTES[record.route].multipart and is_multipart(content_type):
            parsed: ParsedBody = parse_multipart(body, content_type)
        else:
            parsed = parse_body(body)
        record.model, record.stream = parsed.model, parsed.stream
        session = _session(headers, parsed)
        deployment = self._director.resolve(tenant, parsed.model, session)
        return self._call(
            incoming, record, downstream, deployment, body, parsed,
            pinned=_pinned(parsed, deployment), session=session,
        )  # fmt: skip

    async def _look_up(self, request: web.Request) -> web.StreamResponse:
        """Asks the engine that made a response for it, or to cancel it."""
        downstream = AiohttpDownstream(request)
        serving = self._find_response(request, AiohttpRequest(request), request[RECORD], downstream)
        return await downstream.run(serving)

    async def _find_response(
        self, request: web.Request, incoming: Incoming, record: RequestRecord, downstream: Downstream
    ) -> None:
        tenant = self.authenticate(incoming.headers, record)
        response_id = request.match_info["response_id"]
        with self._director.admit():
            for deployment in tenant.deployments.values():
                endpoint = endpoint_of_response(response_id, deployment.endpoints)
                if endpoint is not None:
                    break
            else:
                raise errors.response_not_found(response_id)
            body = await self._read_body(incoming)
            parsed = BareBody(model=deployment.name, stream="stream" in request.query)
            call = self._call(
                incoming, record, downstream, deployment, body, parsed,
                pinned=endpoint.replica, session=_session(incoming.headers, parsed), method=request.method,
            )  # fmt: skip
            await self._director.forward(call, self._director.begin(call))

    def _call(
        self,
        incoming: Incoming,
        record: RequestRecord,
        downstream: Downstream,
        deployment: Deployment,
        body: bytes,
        parsed: ParsedBody,
        *,
        pinned: str,
        session: str,
        method: str = "POST",
    ) -> Call:
        """Puts together what the director needs of a request that has been understood."""
        record.model, record.stream, record.deployment = parsed.model, parsed.stream, deployment.name
        route = INFERENCE_ROUTES.get(record.route)
        prompt = NO_PROMPT
        if route is not None and route.metered:
            # What is not metered computes nothing, and leaves no prefix behind.
            prompt = self._director.candidates.selectors.of(deployment).read_prompt(
                parsed.document,
                deployment.endpoints,
                namespace=deployment.namespace,
                deployment=deployment.name,
            )
        context = RequestContext(
            request_id=record.request_id,
            route=record.route,
            namespace=deployment.namespace,
            deployment=deployment.name,
            model=parsed.model,
            stream=parsed.stream,
            body=body,
            prompt=prompt,
            session=session,
        )
        return Call(
            path=incoming.path,
            headers=incoming.headers,
            downstream=downstream,
            record=record,
            context=context,
            parsed=parsed,
            delivery=self._director.delivery(body, parsed, downstream, record),
            pinned=pinned,
            method=method,
        )

    async def _infer(self, request: web.Request) -> web.StreamResponse:
        downstream = AiohttpDownstream(request)
        return await downstream.run(self.infer(AiohttpRequest(request), request[RECORD], downstream))

    async def list_models(self, request: web.Request) -> web.StreamResponse:
        """Lists the deployments that the key may use, then the aliases."""
        tenant = self.authenticate(RequestHeaders(request.raw_headers), request[RECORD])
        aliases = (each for name, each in sorted(tenant.aliases.items()) if name not in tenant.deployments)
        data = [
            *(_model(each) for each in tenant.deployments.values()),
            *(_alias(each, tenant) for each in aliases),
        ]
        return _json({"object": "list", "data": data})

    async def get_model(self, request: web.Request) -> web.StreamResponse:
        """Shows one deployment or alias that the key may use."""
        record = request[RECORD]
        tenant = self.authenticate(RequestHeaders(request.raw_headers), record)
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
                bytes_max=self.body_bytes_max, timeout_seconds=self._body_timeout_seconds
            )
        except TimeoutError as error:
            raise errors.body_timeout(self._body_timeout_seconds) from error
        if body is None:
            raise errors.body_too_large(self.body_bytes_max)
        return body


def _credentials(headers: RequestHeaders) -> str | None:
    """Returns what the client shows: `Authorization`, or Anthropic's `x-api-key` in its place."""
    shown = headers.get("authorization")
    if shown:
        return shown
    key = headers.get("x-api-key")
    return f"Bearer {key}" if key else None


def _pinned(parsed: ParsedBody, deployment: Deployment) -> str:
    """Returns the replica that alone remembers what a request goes on from; empty for none."""
    previous = parsed.document.get("previous_response_id")
    if previous is None:
        return ""
    endpoint = endpoint_of_response(previous, deployment.endpoints)
    return "" if endpoint is None else endpoint.replica


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


def refusal_response(refusal: Refusal, record: RequestRecord) -> web.Response:
    """Renders a refusal in the shape of its route."""
    response = web.Response(
        status=refusal.status,
        body=refusal_body(refusal, shape_of(record.route), record.request_id),
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
