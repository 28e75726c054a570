"""The HTTP application: routes, and what happens around every request.

In come HTTP requests, out come JSON answers that carry the request id. Around each handler: identify,
measure, log, and turn errors into answers. Handlers know nothing of that.
"""

import secrets
import ssl
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import structlog
from aiohttp import web
from prometheus_client import Counter, Histogram

from controlplane.gateway import deployments, namespaces, nodes, watch
from controlplane.gateway.backend import Backend
from controlplane.gateway.failures import error_response, http_error_response, internal_response
from controlplane.gateway.openapi import openapi_document
from controlplane.gateway.requests import BACKEND, READY, REQUEST_ID, STOPPING, Sockets
from core import VERSION
from core.errors import MillraceError, Unavailable
from core.rpc import TlsFiles
from core.telemetry import REQUEST_ID_HEADER, render_metrics, request_id_of, trace_id_of

_log = structlog.get_logger(__name__)

# The largest honest declaration (100 models with arguments) is far below.
BODY_BYTES_MAX = 1024 * 1024
# Open WebSockets are told to go; what does not is cut.
SHUTDOWN_SECONDS = 2.0

# Asked for every few seconds by probes and scrapers.
_QUIET_ROUTES = frozenset({"/health", "/metrics"})

_requests = Counter("millrace_gateway_requests_total", "HTTP requests", ["method", "route", "status"])
_seconds = Histogram(
    "millrace_gateway_request_duration_seconds", "Time until the answer was complete", ["method", "route"]
)

_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def build_app(backend: Backend, *, ready: Callable[[], bool]) -> web.Application:
    """Builds the application.

    Args:
        backend: The gRPC side; closed by its owner.
        ready: Tells whether the control plane can answer; /health says so.
    """
    app = web.Application(middlewares=[_around], client_max_size=BODY_BYTES_MAX)
    app[BACKEND] = backend
    app[READY] = ready
    app[STOPPING] = Sockets()
    app.router.add_get("/health", _health)
    app.router.add_get("/metrics", _metrics)
    app.router.add_get("/openapi.json", _openapi)
    deployments.add_routes(app)
    namespaces.add_routes(app)
    nodes.add_routes(app)
    watch.add_routes(app)
    app.on_shutdown.append(watch.close_all)
    return app


@dataclass(slots=True)
class Gateway:
    """A gateway that listens.

    Attributes:
        runner: aiohttp's runner.
        port: Port that it listens on.
    """

    runner: web.AppRunner
    port: int

    async def stop(self) -> None:
        """Stops accepting, tells open WebSockets to go and ends the rest."""
        await self.runner.cleanup()


async def start_gateway(
    app: web.Application, *, host: str, port: int, tls: TlsFiles | None = None
) -> Gateway:
    """Starts to listen.

    Raises:
        Unavailable: The port is taken.
    """
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=SHUTDOWN_SECONDS, handle_signals=False)
    await runner.setup()
    site = web.TCPSite(runner, host, port, ssl_context=_server_context(tls))
    try:
        await site.start()
    except OSError as error:
        await runner.cleanup()
        raise Unavailable(f"cannot listen on {host}:{port}: is the port taken?") from error
    bound = runner.addresses[0][1]
    return Gateway(runner, int(bound))


def _server_context(tls: TlsFiles | None) -> ssl.SSLContext | None:
    if tls is None or tls.certificate is None:
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(tls.certificate, tls.key)
    return context


@web.middleware
async def _around(request: web.Request, handler: _Handler) -> web.StreamResponse:
    request_id = request_id_of(request.headers)
    request[REQUEST_ID] = request_id
    trace_id = trace_id_of(request.headers) or secrets.token_hex(16)
    structlog.contextvars.bind_contextvars(request_id=request_id, trace_id=trace_id)
    route = _route_of(request)
    started = time.monotonic()
    status = 499
    try:
        response = await _answered(request, handler, request_id)
        status = response.status
        return response
    finally:
        elapsed = time.monotonic() - started
        _requests.labels(request.method if route != "unknown" else "any", route, str(status)).inc()
        if route != watch.ROUTE:
            _seconds.labels(request.method if route != "unknown" else "any", route).observe(elapsed)
        log = _log.debug if route in _QUIET_ROUTES else _log.info
        log(
            "request",
            method=request.method,
            path=request.path,
            status=status,
            duration_ms=round(elapsed * 1000, 1),
        )
        structlog.contextvars.unbind_contextvars("request_id", "trace_id")


async def _answered(request: web.Request, handler: _Handler, request_id: str) -> web.StreamResponse:
    try:
        response = await handler(request)
    except MillraceError as error:
        return error_response(error, request_id)
    except web.HTTPException as error:
        return http_error_response(error, _http_message(request, error), request_id)
    except Exception:  # noqa: BLE001 - every escape becomes an answer; the cause is logged
        _log.exception("handler failed", path=request.path)
        return internal_response(request_id)
    if not response.prepared:
        response.headers[REQUEST_ID_HEADER] = request_id
    return response


def _http_message(request: web.Request, error: web.HTTPException) -> str:
    match error.status:
        case 404:
            return f"there is nothing at {request.path[:200]}; /openapi.json lists what there is"
        case 405:
            allowed = error.headers.get("Allow", "another method").replace(",", " or ")
            return f"{request.method} is not possible here; use {allowed}"
        case 413:
            return f"the body is larger than {BODY_BYTES_MAX} bytes; split the request"
        case _:
            return error.reason


def _route_of(request: web.Request) -> str:
    """The route's pattern: a bounded set, unlike paths."""
    resource = request.match_info.route.resource
    return resource.canonical if resource is not None else "unknown"


async def _health(request: web.Request) -> web.StreamResponse:
    serving = request.app[READY]()
    return web.json_response(
        {"status": "serving" if serving else "starting", "version": VERSION}, status=200 if serving else 503
    )


async def _metrics(_request: web.Request) -> web.StreamResponse:
    page, content_type = render_metrics()
    return web.Response(body=page, headers={"Content-Type": content_type})


async def _openapi(_request: web.Request) -> web.StreamResponse:
    return web.json_response(openapi_document())
