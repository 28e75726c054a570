"""Serves the requests of the hot path: account, surface, and an answer to whatever goes wrong.

In come a request and its client's side, out goes an answer: the engine's, or a refusal in the shape of the
route. It does for the hot path what the middleware of `app` does for aiohttp's requests, and counts both, so
that a worker knows when it is idle. It decides nothing about requests.
"""

import asyncio
from collections.abc import Callable

from aiohttp import hdrs

from core.clock import Clock
from core.telemetry import new_identifiers
from router.access_log import AccessLog
from router.director import Director
from router.exchange import Exchange
from router.metrics import RouterMetrics
from router.openai import errors
from router.openai.errors import Refusal
from router.openai.routes import shape_of
from router.openai.shapes import refusal_body
from router.openai.surface import OpenAISurface
from router.record import RequestRecord
from router.wire.downstream import WireDownstream
from router.wire.request import WireRequest


class WireServing:
    """Serves the hot path of one worker.

    Attributes:
        in_flight: Requests that have begun and not ended, aiohttp's included.
        surface: Understands requests.
        director: Sends them.
        loop: Of the worker.
    """

    def __init__(
        self,
        surface: OpenAISurface,
        director: Director,
        metrics: RouterMetrics,
        access_log: AccessLog,
        clock: Clock,
    ) -> None:
        """Takes what serves requests and what accounts for them; an event loop must be running."""
        self.in_flight = 0
        self.surface = surface
        self.director = director
        self.loop = asyncio.get_running_loop()
        self._metrics = metrics
        self._access_log = access_log
        self._clock = clock
        self._idle = asyncio.Event()
        self._idle.set()

    async def wait_idle(self, timeout_seconds: float) -> bool:
        """Waits until no request is in flight; tells whether that came about in time."""
        try:
            async with asyncio.timeout(timeout_seconds):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True

    def serve(
        self, request: WireRequest, downstream: WireDownstream, on_done: Callable[[], None]
    ) -> Exchange:
        """Serves a request of the hot path: what the middleware does for aiohttp's.

        Args:
            request: Its head and what has come of its body.
            downstream: Its client's side.
            on_done: Called when it has ended, perhaps before this returns.
        """
        head = request.head
        request_id, trace_parent = new_identifiers()
        request_id = head.request_id or request_id
        trace_parent = head.trace_parent or trace_parent
        record = RequestRecord(
            request_id=request_id,
            trace_id=head.trace_id or trace_parent[3:35],
            trace_parent=trace_parent,
            method="POST",
            route=head.route,
            started_seconds=self._clock.monotonic(),
        )
        downstream.identify(request_id)
        self.begin()
        exchange = Exchange(self, request, downstream, record, on_done)
        exchange.start()
        return exchange

    def ended(self, record: RequestRecord) -> None:
        """Closes the account of a request."""
        record.end(self._metrics, self._access_log, self._clock)
        self.end()

    @staticmethod
    def refuse(refusal: Refusal, record: RequestRecord, downstream: WireDownstream) -> None:
        """Answers a refusal, in the shape of the route; nothing may look complete where more has begun."""
        record.reason, record.status = refusal.why, refusal.status
        if downstream.started:
            downstream.abort()
            return
        body = refusal_body(refusal, shape_of(record.route), record.request_id)
        downstream.closes = refusal.headers.get(hdrs.CONNECTION) == "close"
        headers = {name: value for name, value in refusal.headers.items() if name != hdrs.CONNECTION}
        downstream.start(
            refusal.status,
            {"Content-Type": "application/json", errors.REASON_HEADER: refusal.why.value, **headers},
            length=len(body),
        )
        downstream.write(body)
        downstream.end()

    def begin(self) -> None:
        """Counts a request in."""
        self._metrics.request_started()
        self.in_flight += 1
        self._idle.clear()

    def end(self) -> None:
        """Counts a request out."""
        self.in_flight -= 1
        if self.in_flight == 0:
            self._idle.set()
