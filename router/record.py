"""The account of one request: what it was, how it ended, what the log and the metrics say of it.

Filled in while the request runs, closed exactly once at its end. It holds no key and no content.
"""

from dataclasses import dataclass
from typing import Any, Final

from aiohttp import web

from core.clock import Clock
from router.access_log import AccessLog, milliseconds, number, quoted
from router.metering.usage import UNKNOWN, TokenCounts
from router.metrics import RouterMetrics
from router.openai.errors import Reason
from router.view.view import Tier

# nginx's number for a client that left before it had its answer.
CLIENT_CLOSED_REQUEST = 499
# A client may name a model as it likes; operators need to recognise it.
_MODEL_CHARACTERS_MAX: Final = 200

# Members are looked up in their classes, and their values in Python: too much for every request.
_OK: Final = Reason.OK
_BASE: Final = Tier.BASE
_REASONS: Final[dict[Reason, str]] = {each: each.value for each in Reason}
_TIERS: Final[dict[Tier, str]] = {each: each.name.lower() for each in Tier}

# Pieces of lines that come again and again: what stands before the times, and between identifiers and tokens.
_Way = tuple[str, str, str, str, str, int, bool, Tier, str]
_heads: Final[dict[tuple[str, str, int, Reason], str]] = {}
_ways: Final[dict[_Way, str]] = {}
# Clients invent names of models and methods, so that both are begun anew when they are full.
_PIECES_MAX: Final = 2048


def tier_name(tier: Tier) -> str:
    """Returns what a tier is called in logs and usage."""
    return _TIERS[tier]


# The constructor that `dataclass` would write stays interpreted where all else is compiled.
@dataclass(init=False, slots=True)
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
    quiet: bool
    namespace: str
    key_hash: str
    tier: Tier
    model: str
    deployment: str
    endpoint: str
    node: str
    attempts: int
    stream: bool
    status: int
    reason: Reason
    first_byte_seconds: float | None
    why: str
    queue_seconds: float
    counts: TokenCounts
    _closed: bool

    def __init__(
        self,
        request_id: str,
        trace_id: str,
        trace_parent: str,
        method: str,
        route: str,
        started_seconds: float,
        *,
        quiet: bool = False,
        namespace: str = "",
        key_hash: str = "",
        tier: Tier = _BASE,
    ) -> None:
        self.request_id = request_id
        self.trace_id = trace_id
        self.trace_parent = trace_parent
        self.method = method
        self.route = route
        self.started_seconds = started_seconds
        self.quiet = quiet
        self.namespace = namespace
        self.key_hash = key_hash
        self.tier = tier
        self.model = ""
        self.deployment = ""
        self.endpoint = ""
        self.node = ""
        self.attempts = 0
        self.stream = False
        self.status = 0
        self.reason = _OK
        self.first_byte_seconds = None
        self.why = ""
        self.queue_seconds = 0.0
        self.counts = UNKNOWN
        self._closed = False

    def end(self, metrics: RouterMetrics, log: AccessLog, clock: Clock) -> None:
        """Closes the account: one log line, one count. Closing twice does nothing."""
        if self._closed:
            return
        self._closed = True
        duration_seconds: float = clock.monotonic() - self.started_seconds
        metrics.request_ended(
            route=self.route,
            status=self.status,
            reason=self.reason,
            duration_seconds=duration_seconds,
            first_byte_seconds=self.first_byte_seconds,
        )
        if log.machine:
            log.add(self.line(duration_seconds), quiet=self.quiet)
        else:
            log.write(self.fields(duration_seconds), quiet=self.quiet)

    def fields(self, duration_seconds: float) -> dict[str, Any]:
        """Returns what the log says of the request, by name.

        Args:
            duration_seconds: Of the whole request.
        """
        first_byte = self.first_byte_seconds
        return {
            "method": self.method,
            "route": self.route,
            "status": self.status,
            "reason": _REASONS[self.reason],
            "duration_ms": round(duration_seconds * 1000, 3),
            "first_byte_ms": None if first_byte is None else round(first_byte * 1000, 3),
            "request_id": self.request_id,
            "trace_id": self.trace_id,
            "model": self.model[:_MODEL_CHARACTERS_MAX],
            "namespace": self.namespace,
            "deployment": self.deployment,
            "endpoint": self.endpoint,
            "node": self.node,
            "attempts": self.attempts,
            "stream": self.stream,
            "tier": _TIERS[self.tier],
            "why": self.why,
            "queue_ms": round(self.queue_seconds * 1000, 3),
            "prompt_tokens": self.counts.prompt,
            "completion_tokens": self.counts.completion,
            "cached_tokens": self.counts.cached,
        }

    def line(self, duration_seconds: float) -> str:
        """Returns `fields` as JSON, without the last brace: what the log adds stands behind it.

        Written out because a dict and a serialiser cost several times as much.

        Args:
            duration_seconds: Of the whole request.
        """
        head = _heads.get((self.method, self.route, self.status, self.reason)) or self._make_head()
        way = _ways.get(self._way()) or self._make_way()
        first_byte, counts = self.first_byte_seconds, self.counts
        return (
            f"{head}{milliseconds(duration_seconds)}"
            f',"first_byte_ms":{"null" if first_byte is None else milliseconds(first_byte)}'
            f',"request_id":{quoted(self.request_id)},"trace_id":{quoted(self.trace_id)}'
            f"{way}{milliseconds(self.queue_seconds)}"
            f',"prompt_tokens":{number(counts.prompt)},"completion_tokens":{number(counts.completion)}'
            f',"cached_tokens":{number(counts.cached)}'
        )

    def _make_head(self) -> str:
        head = (
            f'{{"method":{quoted(self.method)},"route":{quoted(self.route)},"status":{self.status}'
            f',"reason":"{_REASONS[self.reason]}","duration_ms":'
        )
        if len(_heads) >= _PIECES_MAX:
            _heads.clear()
        _heads[self.method, self.route, self.status, self.reason] = head
        return head

    def _way(self) -> _Way:
        return (
            self.model, self.namespace, self.deployment, self.endpoint, self.node, self.attempts, self.stream,
            self.tier, self.why,
        )  # fmt: skip

    def _make_way(self) -> str:
        way = (
            f',"model":{quoted(self.model[:_MODEL_CHARACTERS_MAX])},"namespace":{quoted(self.namespace)}'
            f',"deployment":{quoted(self.deployment)},"endpoint":{quoted(self.endpoint)}'
            f',"node":{quoted(self.node)},"attempts":{self.attempts}'
            f',"stream":{"true" if self.stream else "false"},"tier":"{_TIERS[self.tier]}"'
            f',"why":{quoted(self.why)},"queue_ms":'
        )
        # The name of a model that is refused may be as long as a body.
        if len(self.model) <= _MODEL_CHARACTERS_MAX:
            if len(_ways) >= _PIECES_MAX:
                _ways.clear()
            _ways[self._way()] = way
        return way


RECORD: web.RequestKey[RequestRecord] = web.RequestKey("record", RequestRecord)
