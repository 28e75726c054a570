"""What one attempt counts: from the moment an endpoint is chosen to the end of its answer.

    open ──► answered ──► ended          `close` gives back what `open` has taken, however it ended
       └───► failed

In come calls, endpoints and what became of them; out go counts: requests in flight and prompt tokens pending
at the endpoint, the deployment's lane, the endpoint's health, metrics, and at the end one `Usage` a request.
Both ways of serving a request, with a task and without, count here and nowhere else. It sends nothing,
waits for nothing and decides nothing.
"""

import structlog

from core.clock import Clock
from router.admission.lane import Lane
from router.call import Call
from router.candidates import Candidates
from router.metering.usage import Usage, UsageOutcome, UsageSink
from router.metrics import RouterMetrics
from router.openai.errors import Reason
from router.picking.contract import Candidate
from router.picking.selector import Flight
from router.record import CLIENT_CLOSED_REQUEST, tier_name
from router.upstream.answer import Answer
from router.upstream.failures import AttemptFailed, Owner
from router.upstream.health import DEFAULT_BREAKER, Breaker, EndpointHealth, Probe
from router.upstream.relay import Outcome
from router.view.source import ViewSource
from router.view.view import Endpoint

_log = structlog.get_logger(__name__)

# 48 bits tell a tenant's keys apart, and give nothing away.
KEY_HASH_PREFIX_CHARACTERS = 12


class Attempt:
    """One attempt that counts, until it is closed.

    Attributes:
        endpoint: Where.
    """

    __slots__ = ("_candidates", "_flight", "_lane", "_open", "_probe", "endpoint")

    def __init__(
        self, endpoint: Endpoint, lane: Lane, flight: Flight, probe: Probe, candidates: Candidates
    ) -> None:
        self.endpoint = endpoint
        self._lane = lane
        self._flight = flight
        self._probe = probe
        self._candidates = candidates
        self._open = True

    def first_byte(self) -> None:
        """The engine has computed the prompt."""
        self._flight.first_byte()

    def close(self) -> None:
        """Gives back what was counted; again does nothing."""
        if not self._open:
            return
        self._open = False
        self._flight.close()
        self._probe.end()
        lane = self._lane
        lane.in_flight -= 1
        lane.ended_total += 1
        if lane.line:
            self._candidates.gate.pump(lane)


class Attempts:
    """Counts the attempts of one worker."""

    def __init__(
        self,
        *,
        source: ViewSource,
        candidates: Candidates,
        health: EndpointHealth,
        metrics: RouterMetrics,
        clock: Clock,
        usage_sink: UsageSink | None,
    ) -> None:
        """Takes what it works with; without a sink, usage goes to the metrics alone."""
        self._source = source
        self._candidates = candidates
        self._health = health
        self._metrics = metrics
        self._monotonic = clock.monotonic
        self._usage_sink = usage_sink

    def open(self, call: Call, candidate: Candidate) -> Attempt:
        """Counts an attempt that is about to be sent, before the next await (law 2)."""
        endpoint, record, selector = candidate.endpoint, call.record, call.selector
        assert selector is not None, "whoever was chosen was chosen by one"
        record.endpoint, record.node = endpoint.replica, endpoint.node
        call.tried.add(endpoint.identity)
        call.attempts += 1
        record.attempts = call.attempts
        lane = self._candidates.lane(call)
        lane.in_flight += 1
        probe = self._health.probe(endpoint)
        probe.begin()
        return Attempt(endpoint, lane, selector.send(call.context, candidate), probe, self._candidates)

    def answered(self, call: Call, attempt: Attempt, answer: Answer) -> None:
        """Notes the first byte of an answer."""
        attempt.first_byte()
        record, now = call.record, self._monotonic()
        record.first_byte_seconds = now - record.started_seconds
        record.status = answer.status
        if answer.status >= 400:
            self._metrics.upstream_error(Owner.CLIENT if answer.status < 500 else Owner.ENGINE)
        elif call.parsed.stream:
            self._candidates.lane(call).first_tokens.add(record.first_byte_seconds, now)
        self._health.succeeded(attempt.endpoint)

    def ended(self, call: Call, endpoint: Endpoint, outcome: Outcome) -> None:
        """Takes account of how an answer ended."""
        if outcome is Outcome.COMPLETE:
            self._completed(call, endpoint)
            return
        record, meter = call.record, call.delivery.meter
        match outcome:
            case Outcome.CLIENT_GONE:
                meter.outcome = UsageOutcome.CLIENT_GONE
                record.reason = Reason.CLIENT_DISCONNECTED
                record.status = CLIENT_CLOSED_REQUEST
                self._metrics.upstream_error(Owner.CLIENT)
            case Outcome.CLIENT_STALLED:
                meter.outcome = UsageOutcome.CLIENT_GONE
                record.reason = Reason.CLIENT_STALLED
                self._metrics.upstream_error(Owner.CLIENT)
            case Outcome.BROKEN:
                record.reason = Reason.UPSTREAM_BROKEN
                self._metrics.upstream_error(Owner.TRANSPORT)
                self._health.failed(endpoint, self._breaker(endpoint))
            case Outcome.IDLE:
                record.reason = Reason.IDLE_TIMEOUT
                self._metrics.upstream_error(Owner.ENGINE)
                self._health.failed(endpoint, self._breaker(endpoint))

    def failed(self, call: Call, endpoint: Endpoint, error: AttemptFailed) -> None:
        """Takes account of an attempt that ended before its first byte went to the client."""
        self._metrics.upstream_error(error.owner)
        ejection = self._health.failed(endpoint, self._breaker(endpoint))
        _log.warning(
            "attempt failed",
            request_id=call.record.request_id,
            endpoint=endpoint.replica,
            node=endpoint.node,
            cause=error.cause.value,
            owner=error.owner.value,
            error=str(error),
            ejected_seconds=round(ejection, 3),
        )

    def settle(self, call: Call) -> None:
        """Hands on what a request used, once, if any engine got it."""
        meter, record = call.delivery.meter, call.record
        if not call.attempts or not meter.metered:
            return
        record.counts = meter.counts()
        if self._usage_sink is None:
            self._metrics.settled(meter.outcome, record.counts)
            return
        self._usage_sink.take(
            Usage(
                request_id=record.request_id,
                namespace=call.context.namespace,
                key_hash_prefix=record.key_hash[:KEY_HASH_PREFIX_CHARACTERS],
                deployment=call.context.deployment,
                model=call.parsed.model,
                route=call.context.route,
                tier=tier_name(record.tier),
                counts=record.counts,
                outcome=meter.outcome,
                latency_ms=(self._monotonic() - record.started_seconds) * 1000,
            )
        )

    def _completed(self, call: Call, endpoint: Endpoint) -> None:
        """Takes account of an answer that came whole, which may still say inside that it failed."""
        if call.delivery.failure is not None:
            self.failed(call, endpoint, call.delivery.failure)
        message, is_clients = call.delivery.meter.failure
        if not message:
            if call.record.status < 400:
                call.delivery.meter.outcome = UsageOutcome.COMPLETE
            return
        call.record.reason = Reason.ENGINE_CLIENT_ERROR if is_clients else Reason.ENGINE_ERROR
        self._metrics.upstream_error(Owner.CLIENT if is_clients else Owner.ENGINE)
        if not is_clients:
            self._health.failed(endpoint, self._breaker(endpoint))
            _log.warning(
                "engine reported an error inside its answer",
                request_id=call.record.request_id,
                endpoint=endpoint.replica,
                node=endpoint.node,
                error=message,
            )

    def _breaker(self, endpoint: Endpoint) -> Breaker:
        deployment = self._source.view.deployment(endpoint.namespace, endpoint.deployment)
        return DEFAULT_BREAKER if deployment is None else Breaker.of(deployment.routing)
