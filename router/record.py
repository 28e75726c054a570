"""The account of one request: what it was, how it ended, what the log and the metrics say of it.

Filled in while the request runs, closed exactly once at its end. It holds no key and no content.
"""

from dataclasses import dataclass, field

from aiohttp import web

from core.clock import Clock
from router.access_log import AccessLog
from router.metering.usage import UNKNOWN, TokenCounts
from router.metrics import RouterMetrics
from router.openai.errors import Reason
from router.view.view import Tier

# nginx's number for a client that left before it had its answer.
CLIENT_CLOSED_REQUEST = 499


@dataclass(slots=True)
class RequestRecord:
    """What is known of a request so far.

    Attributes:
        request_id: The caller's or ours.
        trace_id: Of the trace context.
        trace_parent: Header for the engine.
        method: HTTP method.
        route: Template of the route, or `other`.
        started_seconds: On the monotonic clock.
        quiet: True for probes and scrapes, which are logged at debug level.
        namespace: Tenant; empty before authentication.
        key_hash: Of the API key; never logged.
        tier: Class of service of the key.
        model: As the client named it.
        deployment: Where it goes; empty before it is found.
        endpoint: Replica that answered or was tried last.
        node: Where that runs.
        attempts: Endpoints that were tried.
        stream: True when the client asked for a stream.
        status: HTTP status that the client got.
        reason: How it ended.
        first_byte_seconds: Until the engine's first byte; None where there was none.
        why: Why the endpoint was chosen; empty where none was.
        queue_seconds: How long it waited for room.
        counts: Tokens that it used.
    """

    request_id: str
    trace_id: str
    trace_parent: str
    method: str
    route: str
    started_seconds: float
    quiet: bool = False
    namespace: str = ""
    key_hash: str = ""
    tier: Tier = Tier.BASE
    model: str = ""
    deployment: str = ""
    endpoint: str = ""
    node: str = ""
    attempts: int = 0
    stream: bool = False
    status: int = 0
    reason: Reason = Reason.OK
    first_byte_seconds: float | None = None
    why: str = ""
    queue_seconds: float = 0.0
    counts: TokenCounts = UNKNOWN
    _closed: bool = field(default=False, repr=False)

    def end(self, metrics: RouterMetrics, log: AccessLog, clock: Clock) -> None:
        """Closes the account: one log line, one count. Closing twice does nothing."""
        if self._closed:
            return
        self._closed = True
        duration = clock.monotonic() - self.started_seconds
        reason = self.reason.value
        first_byte = self.first_byte_seconds
        metrics.request_ended(
            route=self.route,
            status=self.status,
            reason=reason,
            duration_seconds=duration,
            first_byte_seconds=first_byte,
        )
        log.write(
            {
                "method": self.method,
                "route": self.route,
                "status": self.status,
                "reason": reason,
                "duration_ms": round(duration * 1000, 3),
                "first_byte_ms": None if first_byte is None else round(first_byte * 1000, 3),
                "request_id": self.request_id,
                "trace_id": self.trace_id,
                "model": self.model[:200],
                "namespace": self.namespace,
                "deployment": self.deployment,
                "endpoint": self.endpoint,
                "node": self.node,
                "attempts": self.attempts,
                "stream": self.stream,
                "tier": self.tier.name.lower(),
                "why": self.why,
                "queue_ms": round(self.queue_seconds * 1000, 3),
                "prompt_tokens": self.counts.prompt,
                "completion_tokens": self.counts.completion,
                "cached_tokens": self.counts.cached,
            },
            quiet=self.quiet,
        )


RECORD: web.RequestKey[RequestRecord] = web.RequestKey("record", RequestRecord)
