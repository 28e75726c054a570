"""Puts a router worker together: view, director, surface, health, metrics.

In come settings, a store and a clock; out comes an aiohttp application and the coroutines that must run
beside it. Every response leaves through one middleware, which gives it a request id, an OpenAI-shaped
error where it failed, one log line and one count.
"""

import asyncio
import math
import os
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import orjson
import structlog
from aiohttp import hdrs, web

from core import VERSION
from core.clock import Clock
from core.identity import Principal, Role, TokenAuthenticator, bearer_token
from core.store import Store
from core.telemetry import (
    REQUEST_ID_HEADER,
    TRACE_PARENT_HEADER,
    new_trace_parent,
    request_id_of,
    trace_id_of,
)
from router.access_log import AccessLog
from router.decisions.render import render_decision
from router.decisions.siblings import Siblings
from router.director import Director
from router.metering.usage import UsageSink
from router.metrics import MULTIPROCESS_VARIABLE, RouterMetrics
from router.openai import errors
from router.openai.errors import Reason, Refusal
from router.openai.routes import INFERENCE_ROUTES
from router.openai.surface import OpenAISurface, refusal_of_http, refusal_response
from router.picking.contract import Strategy
from router.record import CLIENT_CLOSED_REQUEST, RECORD, RequestRecord
from router.serving import WireServing
from router.settings import RouterSettings
from router.upstream.failures import Cause
from router.upstream.forward import Forwarder
from router.upstream.loads import LoadTable
from router.upstream.pool import UpstreamPool
from router.view.source import ViewSource
from router.wire.deadlines import Deadlines
from router.wire.outbox import Outbox
from router.wire.server import WireRunner

_log = structlog.get_logger(__name__)

HEALTH_ROUTE = "/health"
METRICS_ROUTE = "/metrics"
DEBUG_ROUTE = "/debug/endpoints"
DECISION_ROUTE = "/debug/decisions/{request_id}"
_QUIET_ROUTES = (HEALTH_ROUTE, METRICS_ROUTE)

# How often the age of the view is written to its gauge; scrapes are rarer.
_AGE_SECONDS = 1.0

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class RouterApplication:
    """One worker: build it on the event loop, run its services beside the server, close it after.

    Attributes:
        application: To be served.
        source: The view.
        director: Serves requests.
        metrics: What is counted.
        serving: Serves the hot path, and counts all requests.
    """

    def __init__(
        self,
        settings: RouterSettings,
        *,
        store: Store,
        strategy: Strategy,
        clock: Clock,
        admin_token: str = "",
        agent_token: str = "",
        metrics: RouterMetrics | None = None,
        usage_sink: UsageSink | None = None,
    ) -> None:
        self.metrics = metrics or RouterMetrics()
        self._access_log = AccessLog()
        loads = LoadTable()
        self.source = ViewSource(store, clock, take_in_flight_peak=loads.take_peak)
        self._outbox = Outbox(asyncio.get_running_loop())
        self._pool = UpstreamPool(
            connect_timeout_seconds=settings.connect_timeout_seconds,
            clock=clock,
            deadlines=Deadlines(clock),
            outbox=self._outbox,
        )
        self._exact = settings.exact_index(agent_token, clock)
        self.director = Director(
            source=self.source,
            strategy=strategy,
            forwarder=Forwarder(
                self._pool,
                settings.timeouts(),
                clock,
                on_stale=lambda: self.metrics.retried(Cause.STALE_CONNECTION),
            ),
            loads=loads,
            metrics=self.metrics,
            clock=clock,
            requests_in_flight_max=settings.requests_in_flight_max,
            exact=self._exact,
            bounds=settings.bounds(),
            usage_sink=usage_sink,
        )
        folder = os.environ.get(MULTIPROCESS_VARIABLE)
        self._siblings = Siblings(None if folder is None else Path(folder), self._decision)
        self._clock = clock
        self._admin = TokenAuthenticator({admin_token: Principal("admin", Role.ADMIN)})
        self._surface = OpenAISurface(
            self.director,
            body_bytes_max=settings.request_body_bytes_max,
            body_timeout_seconds=settings.body_timeout_seconds,
        )
        self.serving = WireServing(self._surface, self.director, self.metrics, self._access_log, clock)
        # The surface reads bodies within bounds of its own.
        self.application = web.Application(middlewares=[self._account], client_max_size=0)
        self._surface.add_routes(self.application.router)
        self.application.router.add_get(HEALTH_ROUTE, self._health)
        self.application.router.add_get(METRICS_ROUTE, self._metrics_page)
        self.application.on_response_prepare.append(add_request_id)
        if admin_token:
            self.application.router.add_get(DEBUG_ROUTE, self._debug)
            self.application.router.add_get(DECISION_ROUTE, self._debug_decision)

    async def wait_view(self, timeout_seconds: float) -> None:
        """Waits until there is a view, or the time is over."""
        await self.source.wait_changed(0, timeout_seconds)

    def services(self) -> dict[str, Any]:
        """Returns the coroutines to run beside the server, by name."""
        services: dict[str, Any] = {
            "view": self.source.run(),
            "view-age": self._watch_age(),
            "gate": self.director.candidates.gate.run(),
            "siblings": self._siblings.serve(),
        }
        if self._exact is not None:
            services["kv-events"] = self._exact.run()
        return services

    async def close(self) -> None:
        """Closes the connections to engines and writes what is left of the log."""
        await self._pool.close()
        if self._exact is not None:
            await self._exact.close()
        self._access_log.flush()
        self.metrics.flush()

    async def _watch_age(self) -> None:
        while True:
            self._measure()
            await asyncio.sleep(_AGE_SECONDS)

    def _measure(self) -> None:
        indexes = [each.index for each in self.director.candidates.selectors]
        self.metrics.view_aged(self.source.age_seconds())
        self.metrics.index_measured(
            sum(len(each) for each in indexes), sum(each.estimated_bytes for each in indexes)
        )
        gate = self.director.candidates.gate
        self.metrics.waiting_measured(*gate.waiting(), gate.waiting_bytes)
        self.metrics.flush()

    def runner(self, **options: Any) -> web.BaseRunner:
        """Makes what serves the application, with the inference routes on the hot path.

        Args:
            options: Of aiohttp's runner.
        """
        return WireRunner(
            self.application,
            routes={route.encode(): route for route in INFERENCE_ROUTES},
            serve=self.serving.serve,
            outbox=self._outbox,
            access_log=None,
            # A client that has left must free its engine at once.
            handler_cancellation=True,
            # Bodies go on as they came.
            auto_decompress=False,
            **options,
        )

    @web.middleware
    async def _account(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        record = self._open_record(request)
        request[RECORD] = record
        self.serving.begin()
        try:
            response = await self._guarded(request, handler, record)
        except asyncio.CancelledError:
            # The server cancels the handler of a client that has left.
            record.status, record.reason = CLIENT_CLOSED_REQUEST, Reason.CLIENT_DISCONNECTED
            raise
        else:
            record.status = record.status or response.status
            return response
        finally:
            record.end(self.metrics, self._access_log, self._clock)
            self.serving.end()

    async def _guarded(
        self, request: web.Request, handler: Handler, record: RequestRecord
    ) -> web.StreamResponse:
        """Runs the handler and turns whatever it raises into a response."""
        try:
            return await handler(request)
        except Refusal as refusal:
            return self._refuse(refusal, record)
        except web.HTTPException as error:
            return self._refuse(refusal_of_http(error, request), record)
        except Exception:  # noqa: BLE001 - the client gets an answer in any case, the operator the trace
            _log.exception("request failed inside the router", request_id=record.request_id)
            return self._refuse(errors.internal_error(), record)

    @staticmethod
    def _refuse(refusal: Refusal, record: RequestRecord) -> web.Response:
        record.reason, record.status = refusal.why, refusal.status
        return refusal_response(refusal, record)

    def _open_record(self, request: web.Request) -> RequestRecord:
        resource = request.match_info.route.resource
        route = "other" if resource is None else resource.canonical
        trace_id = trace_id_of(request.headers)
        trace_parent = request.headers.get(TRACE_PARENT_HEADER, "") if trace_id else new_trace_parent()
        return RequestRecord(
            request_id=request_id_of(request.headers),
            trace_id=trace_id or trace_parent.split("-")[1],
            trace_parent=trace_parent,
            method=request.method,
            route=route,
            started_seconds=self._clock.monotonic(),
            quiet=route in _QUIET_ROUTES,
        )

    async def _health(self, _request: web.Request) -> web.StreamResponse:
        view = self.source.view
        age = self.source.age_seconds()
        return web.Response(
            status=200 if view.synced else 503,
            body=orjson.dumps(
                {
                    "status": "ok" if view.synced else "starting",
                    "view_synced": view.synced,
                    "view_age_seconds": None if math.isinf(age) else round(age, 3),
                    "endpoints": len(view.endpoints),
                    "in_flight": self.director.loads.total,
                    "version": VERSION,
                }
            ),
            content_type="application/json",
        )

    async def _metrics_page(self, _request: web.Request) -> web.StreamResponse:
        self._measure()
        page, content_type = self.metrics.page()
        return web.Response(body=page, headers={hdrs.CONTENT_TYPE: content_type})

    def _require_admin(self, request: web.Request) -> None:
        token = bearer_token(request.headers.get(hdrs.AUTHORIZATION))
        if token is None:
            raise errors.api_key_missing()
        if self._admin.authenticate(token) is None:
            raise errors.api_key_invalid()

    async def _debug_decision(self, request: web.Request) -> web.StreamResponse:
        """Shows an operator why a request went where it went, whichever worker served it."""
        self._require_admin(request)
        request_id = request.match_info["request_id"]
        document = self._decision(request_id) or await self._siblings.ask(request_id)
        if not document:
            raise errors.decision_unknown(request_id)
        return web.Response(body=document, content_type="application/json")

    def _decision(self, request_id: str) -> bytes:
        """Returns a decision of this worker as JSON; empty where it has none."""
        decision = self.director.candidates.decisions.find(request_id)
        if decision is None:
            return b""
        offset = self._clock.now().timestamp() - self._clock.monotonic()
        return orjson.dumps(render_decision(decision, wall_seconds=lambda moment: moment + offset))

    async def _debug(self, request: web.Request) -> web.StreamResponse:
        """Shows an operator what the next pick would see."""
        self._require_admin(request)
        return web.Response(
            body=orjson.dumps({"endpoints": self._explain()}), content_type="application/json"
        )

    def _explain(self) -> list[Mapping[str, Any]]:
        samples, director, view = self.source.samples, self.director, self.source.view
        found: list[Mapping[str, Any]] = []
        for each in view.endpoints:
            deployment = view.deployment(each.namespace, each.deployment)
            selector = (
                director.candidates.selectors.default
                if deployment is None
                else director.candidates.selectors.of(deployment)
            )
            found.append(
                {
                    "namespace": each.namespace,
                    "deployment": each.deployment,
                    "replica": each.replica,
                    "node": each.node,
                    "url": each.url,
                    "state": each.state.name,
                    "strategy": selector.strategy.name,
                    "in_flight": director.loads.in_flight(each.replica),
                    "in_flight_limit": director.candidates.gate.saturation.limits.get(each.replica),
                    "pending_prefill_tokens": selector.ledger.pending_tokens(each.replica),
                    "prefix_blocks": selector.index.blocks_at(each.identity),
                    "kv_events": self._exact is not None and self._exact.knows(each),
                    "kv_event_blocks": 0 if self._exact is None else self._exact.blocks_at(each.replica),
                    "ejected": director.health.is_ejected(each),
                    "sample_age_seconds": samples.age_seconds(each.replica),
                }
            )
        return found


async def add_request_id(request: web.Request, response: web.StreamResponse) -> None:
    """Gives every response its request id; a signal, so that it also reaches streams."""
    record = request.get(RECORD)
    if record is not None:
        response.headers[REQUEST_ID_HEADER] = record.request_id
