"""The way of a request: authenticate -> admit -> candidates -> pick -> forward -> account.

In comes a client's request, out goes an answer: the engine's, or a `Refusal` to be sent. Everything is
decided from the view and from this process's own counts: no store and no DNS is asked. A request that finds
no room waits at the gate, once; where that does not help, its deployment's fall-back serves it. Another
endpoint is tried only before the first byte has gone to the client (law 6).
"""

import asyncio
from types import TracebackType
from typing import Self

import structlog

from core.clock import Clock
from core.identity import bearer_token, hash_secret
from router.admission.gate import Bounds, NotServed
from router.admission.refusals import refusal_of, states_of
from router.admission.split import Splitter
from router.admission.waiter import waiter_of
from router.call import Call
from router.candidates import Candidates
from router.delivery import Delivery
from router.downstream import Downstream
from router.metering.usage import Usage, UsageOutcome, UsageSink
from router.metrics import RouterMetrics
from router.openai import errors
from router.openai.body import ParsedBody
from router.openai.errors import Reason
from router.picking.contract import Candidate, Strategy
from router.prefix.exact.index import ExactIndex
from router.record import CLIENT_CLOSED_REQUEST, RequestRecord
from router.upstream.answer import Answer
from router.upstream.budget import RetryBudget
from router.upstream.failures import AttemptFailed, Cause, ErrorAnswer, Owner
from router.upstream.forward import Forwarder, Timeouts
from router.upstream.headers import ENDPOINT_HEADER, request_headers
from router.upstream.health import DEFAULT_BREAKER, Breaker, EndpointHealth
from router.upstream.loads import LoadTable
from router.upstream.relay import Outcome, end_answer
from router.view.source import ViewSource
from router.view.view import Alias, Deployment, Endpoint, Miss, Tenant, View

_log = structlog.get_logger(__name__)

# Three engines that fail one after the other are no accident that a fourth attempt would mend.
ATTEMPTS_MAX = 3
# A replacement that is about to be published arrives within this, or not in the client's interest.
FRESH_ENDPOINT_WAIT_SECONDS = 1.0
# 48 bits tell a tenant's keys apart, and give nothing away.
KEY_HASH_PREFIX_CHARACTERS = 12


class Admission:
    """How many requests this worker holds, each for as long as the block of a `with` runs."""

    __slots__ = ("_held", "_held_max")

    def __init__(self, held_max: int) -> None:
        self._held = 0
        self._held_max = held_max

    def enter(self) -> Self:
        """Counts a request in; the block that follows counts it out.

        Raises:
            Refusal: There are as many as there may be.
        """
        if self._held >= self._held_max:
            raise errors.router_overloaded(self._held_max)
        self._held += 1
        return self

    def __enter__(self) -> None:
        """Begins the block of a request that is counted already."""

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._held -= 1


class Director:
    """Serves requests. One a worker.

    Attributes:
        loads: Requests in flight by replica.
        health: Which endpoints are left alone.
        candidates: Who can take a request.
        budget: Of retries.
    """

    def __init__(
        self,
        *,
        source: ViewSource,
        strategy: Strategy,
        forwarder: Forwarder,
        timeouts: Timeouts,
        loads: LoadTable,
        metrics: RouterMetrics,
        clock: Clock,
        requests_in_flight_max: int,
        bounds: Bounds,
        exact: ExactIndex | None = None,
        usage_sink: UsageSink | None = None,
    ) -> None:
        """Takes what it works with; usage goes to the metrics where no other sink is given."""
        self._usage_sink: UsageSink = metrics if usage_sink is None else usage_sink
        self.loads = loads
        self.health = EndpointHealth(clock)
        self.budget = RetryBudget(clock)
        self._source = source
        self.candidates = Candidates(
            source=source,
            strategy=strategy,
            loads=loads,
            health=self.health,
            bounds=bounds,
            clock=clock,
            exact=exact,
        )
        self._splitter = Splitter()
        # One for all selectors: it follows endpoints, whatever picks among them.
        self._exact = exact
        self._forwarder = forwarder
        self._timeouts = timeouts
        self._metrics = metrics
        self._clock = clock
        self._admission = Admission(requests_in_flight_max)
        source.subscribe(self._view_changed)

    def _view_changed(self, view: View) -> None:
        self.health.retain(view.endpoints)
        self.loads.retain({endpoint.replica for endpoint in view.endpoints})
        self._splitter.retain(view)
        if self._exact is not None:
            self._exact.follower.view_changed(view.endpoints)
        self._metrics.view_changed(view)
        self.candidates.view_changed(view)

    def authenticate(self, authorization: str | None, record: RequestRecord) -> Tenant:
        """Finds out whose request it is.

        Raises:
            Refusal: No key, an unknown key, or no view yet.
        """
        view = self._source.view
        if not view.synced:
            raise errors.view_not_synced()
        token = bearer_token(authorization)
        if token is None:
            raise errors.api_key_missing()
        found = view.authenticate(hash_secret(token))
        if found is None:
            raise errors.api_key_invalid()
        key, tenant = found
        record.namespace, record.key_hash, record.tier = tenant.name, key.key_hash, key.tier
        return tenant

    def admit(self) -> "Admission":
        """Lets a request in for as long as the block of a `with` runs.

        Raises:
            Refusal: This worker holds as many as it may.
        """
        return self._admission.enter()

    def resolve(self, tenant: Tenant, model: str, session: str = "") -> Deployment:
        """Finds the deployment that a request for a model goes to.

        Args:
            tenant: Whose request it is.
            model: As the client named it; behind an alias there may be several deployments.
            session: What the client calls its session, which stays with one of them; empty for none.

        Raises:
            Refusal: There is none, or there are several.
        """
        found = tenant.resolve(model)
        if isinstance(found, Deployment):
            return found
        if isinstance(found, Alias):
            name = self._splitter.choose(tenant.name, found, tenant.deployments, session)
            if name is None:
                raise errors.alias_without_deployment(model, tuple(each.deployment for each in found.targets))
            return tenant.deployments[name]
        if found is Miss.AMBIGUOUS:
            raise errors.model_ambiguous(model, tenant.declared[model])
        raise errors.model_not_found(model)

    def delivery(
        self, body: bytes, parsed: ParsedBody, downstream: Downstream, record: RequestRecord
    ) -> Delivery:
        """Makes what brings the answer to a request to its client."""
        return Delivery(
            body,
            parsed,
            downstream=downstream,
            record=record,
            client_stall_seconds=self._timeouts.idle_seconds,
        )

    async def forward(self, call: Call) -> None:
        """Sends a request to one endpoint after the other until one answers, and relays that answer.

        Raises:
            Refusal: None did.
        """
        try:
            await self._forward(call)
        except asyncio.CancelledError:
            # The client has left; whatever has gone to it counts.
            call.delivery.meter.outcome = UsageOutcome.CLIENT_GONE
            raise
        finally:
            self._settle(call)

    def _settle(self, call: Call) -> None:
        """Hands on what a request used, once, if any engine got it."""
        meter, record = call.delivery.meter, call.record
        if not call.attempts or not meter.metered:
            return
        record.counts = meter.counts()
        self._usage_sink.take(
            Usage(
                request_id=record.request_id,
                namespace=call.context.namespace,
                key_hash_prefix=record.key_hash[:KEY_HASH_PREFIX_CHARACTERS],
                deployment=call.context.deployment,
                model=call.parsed.model,
                route=call.context.route,
                tier=record.tier.name.lower(),
                counts=record.counts,
                outcome=meter.outcome,
                latency_ms=(self._clock.monotonic() - record.started_seconds) * 1000,
            )
        )

    async def _forward(self, call: Call) -> None:
        self.budget.request()
        self.candidates.lane(call).count_in(call.record.started_seconds)
        if self._exact is not None:
            await self._read_exactly(call)
        failure: AttemptFailed | None = None
        while True:
            candidate = await self._candidate(call, failure)
            if failure is not None:
                if candidate is None:
                    await self._give_up(call, failure)
                    return
                if not self.budget.take():
                    if call.downstream.started:
                        await self._give_up(call, failure)
                        return
                    raise errors.retry_budget_exhausted(call.parsed.model, failure.cause.value)
                self._metrics.retried(failure.cause)
            assert candidate is not None, "a first attempt has one, or was refused"
            try:
                await self._attempt(call, candidate)
                return
            except AttemptFailed as error:
                failure = error
                if call.downstream.started:
                    call.deadline_seconds = None
                self._failed(call, candidate.endpoint, error)
            if not failure.retryable or call.attempts >= ATTEMPTS_MAX + call.delivery.continuations:
                await self._give_up(call, failure)
                return

    async def _read_exactly(self, call: Call) -> None:
        deployment = self._source.view.deployment(call.context.namespace, call.context.deployment)
        if deployment is not None:
            selector = self.candidates.selectors.of(deployment)
            await selector.read_exactly(call.context, call.parsed.document, deployment.endpoints)

    async def _candidate(self, call: Call, failure: AttemptFailed | None) -> Candidate | None:
        """Returns where to send a request now, after the waits that it may have.

        Raises:
            Refusal: It has not been anywhere, and there is no room for it.
        """
        if failure is not None:
            return self.candidates.pick(call) or self.candidates.divert(call) or await self._await_fresh(call)
        candidate = None if self.candidates.lane(call).busy else self.candidates.pick(call)
        return candidate or await self._wait_for_room(call)

    async def _wait_for_room(self, call: Call) -> Candidate:
        """Waits at the gate, or goes to the fall-back where waiting is of no use or has been of none.

        Raises:
            Refusal: There was no room.
        """
        view, context, model = self._source.view, call.context, call.parsed.model
        deployment, gate = view.deployment(context.namespace, context.deployment), self.candidates.gate
        if deployment is None:
            raise errors.no_endpoint(model, {})
        lane, routing, started = self.candidates.lane(call), deployment.routing, self._clock.monotonic()
        absent = not self.candidates.usable(context.namespace, context.deployment)
        if absent:
            candidate = self.candidates.divert(call)
            if candidate is not None:
                gate.divert(lane)
                return candidate
            if not deployment.wanted:
                raise errors.no_endpoint(model, states_of(deployment))
        usual_seconds = gate.bounds.parking_seconds if absent else gate.bounds.queue_seconds
        limit = routing.queue_requests_max
        try:
            return await gate.wait(
                lane,
                waiter_of(
                    context.body,
                    call.record,
                    deadline_seconds=started + (routing.queue_seconds or usual_seconds),
                ),
                lambda: self.candidates.pick(call),
                requests_max=gate.bounds.requests_max if limit is None else limit,
            )
        except NotServed as refused:
            candidate = self.candidates.divert(call)
            if candidate is not None:
                return candidate
            raise refusal_of(
                refused,
                model=model,
                deployment=deployment,
                lane=lane,
                gate=gate,
                usable=len(self.candidates.usable(context.namespace, context.deployment)),
                now_seconds=self._clock.monotonic(),
            ) from None
        finally:
            call.record.queue_seconds = self._clock.monotonic() - started
            self._metrics.waited(call.record.queue_seconds)

    async def _await_fresh(self, call: Call) -> Candidate | None:
        if call.deadline_seconds is None:
            call.deadline_seconds = self._clock.monotonic() + FRESH_ENDPOINT_WAIT_SECONDS
        while True:
            version = self._source.view.version
            candidate = self.candidates.pick(call)
            remaining = call.deadline_seconds - self._clock.monotonic()
            if candidate is not None or remaining <= 0:
                return candidate
            await self._source.wait_changed(version, remaining)

    async def _attempt(self, call: Call, candidate: Candidate) -> None:
        endpoint, record = candidate.endpoint, call.record
        record.endpoint, record.node = endpoint.replica, endpoint.node
        call.tried.add(endpoint.identity)
        call.attempts += 1
        record.attempts = call.attempts
        body = call.delivery.body_for(endpoint)
        headers = request_headers(
            call.headers, request_id=record.request_id, trace_parent=record.trace_parent
        )
        assert call.selector is not None, "whoever was chosen was chosen by one"
        lane = self.candidates.lane(call)
        lane.in_flight += 1
        try:
            with self.health.probe(endpoint), call.selector.send(call.context, candidate) as flight:
                answer = await self._forwarder.attempt(
                    endpoint,
                    call.path,
                    body=body,
                    headers=headers,
                    stream=call.parsed.stream,
                    method=call.method,
                )
                try:
                    flight.first_byte()
                    self._answered(call, endpoint, answer)
                    outcome = await call.delivery.deliver(
                        answer, endpoint, may_continue=self._continues(endpoint)
                    )
                finally:
                    answer.release()
        finally:
            lane.in_flight -= 1
            lane.ended_total += 1
            if lane.line:
                self.candidates.gate.pump(lane)
        self._account(call, endpoint, outcome)

    def _answered(self, call: Call, endpoint: Endpoint, answer: Answer) -> None:
        """Notes the first byte of an answer."""
        record, now = call.record, self._clock.monotonic()
        record.first_byte_seconds = now - record.started_seconds
        record.status = answer.status
        if answer.status >= 400:
            self._metrics.upstream_error(Owner.CLIENT if answer.status < 500 else Owner.ENGINE)
        elif call.parsed.stream:
            self.candidates.lane(call).first_tokens.add(record.first_byte_seconds, now)
        self.health.succeeded(endpoint)

    def _account(self, call: Call, endpoint: Endpoint, outcome: Outcome) -> None:
        match outcome:
            case Outcome.COMPLETE:
                self._completed(call, endpoint)
            case Outcome.CLIENT_GONE:
                call.delivery.meter.outcome = UsageOutcome.CLIENT_GONE
                call.record.reason = Reason.CLIENT_DISCONNECTED
                call.record.status = CLIENT_CLOSED_REQUEST
                self._metrics.upstream_error(Owner.CLIENT)
            case Outcome.CLIENT_STALLED:
                call.delivery.meter.outcome = UsageOutcome.CLIENT_GONE
                call.record.reason = Reason.CLIENT_STALLED
                self._metrics.upstream_error(Owner.CLIENT)
            case Outcome.BROKEN:
                call.record.reason = Reason.UPSTREAM_BROKEN
                self._metrics.upstream_error(Owner.TRANSPORT)
                self.health.failed(endpoint, self._breaker(endpoint))
            case Outcome.IDLE:
                call.record.reason = Reason.IDLE_TIMEOUT
                self._metrics.upstream_error(Owner.ENGINE)
                self.health.failed(endpoint, self._breaker(endpoint))

    def _breaker(self, endpoint: Endpoint) -> Breaker:
        deployment = self._source.view.deployment(endpoint.namespace, endpoint.deployment)
        return DEFAULT_BREAKER if deployment is None else Breaker.of(deployment.routing)

    def _continues(self, endpoint: Endpoint) -> bool:
        deployment = self._source.view.deployment(endpoint.namespace, endpoint.deployment)
        return deployment is not None and deployment.routing.stream_continuation

    def _completed(self, call: Call, endpoint: Endpoint) -> None:
        """Takes account of an answer that came whole, which may still say inside that it failed."""
        if call.delivery.failure is not None:
            self._failed(call, endpoint, call.delivery.failure)
        message, is_clients = call.delivery.meter.failure
        if not message:
            if call.record.status < 400:
                call.delivery.meter.outcome = UsageOutcome.COMPLETE
            return
        call.record.reason = Reason.ENGINE_CLIENT_ERROR if is_clients else Reason.ENGINE_ERROR
        self._metrics.upstream_error(Owner.CLIENT if is_clients else Owner.ENGINE)
        if not is_clients:
            self.health.failed(endpoint, self._breaker(endpoint))
            _log.warning(
                "engine reported an error inside its answer",
                request_id=call.record.request_id,
                endpoint=endpoint.replica,
                node=endpoint.node,
                error=message,
            )

    def _failed(self, call: Call, endpoint: Endpoint, error: AttemptFailed) -> None:
        self._metrics.upstream_error(error.owner)
        ejection = self.health.failed(endpoint, self._breaker(endpoint))
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

    async def _give_up(self, call: Call, failure: AttemptFailed) -> None:
        """Answers a request that no endpoint took: passes on the engine's word or refuses."""
        model = call.parsed.model
        if call.downstream.started:
            own = await call.delivery.abandon(failure)
            call.record.reason = Reason.ENGINE_ERROR if own else Reason.UPSTREAM_BROKEN
            return
        if failure.answer is not None:
            await self._pass_on(call, failure.answer)
            return
        if failure.cause is Cause.FIRST_BYTE_TIMEOUT:
            raise errors.first_byte_timeout(self._timeouts.until_first_byte(stream=call.parsed.stream))
        if failure.cause is Cause.CONNECT_TIMEOUT:
            raise errors.connect_timeout(self._timeouts.connect_seconds)
        raise errors.all_endpoints_failed(model, call.attempts, failure.cause.value)

    async def _pass_on(self, call: Call, answer: ErrorAnswer) -> None:
        """Sends the client an engine's own error."""
        call.record.status, call.record.reason = answer.status, Reason.ENGINE_ERROR
        headers = {
            "Content-Type": answer.content_type,
            "Retry-After": str(errors.RETRY_AFTER_SECONDS),
            errors.REASON_HEADER: Reason.ENGINE_ERROR.value,
            ENDPOINT_HEADER: call.record.endpoint,
        }
        body = call.delivery.translated(answer.status, answer.body)
        call.downstream.start(answer.status, headers, length=len(body))
        call.downstream.write(body)
        await end_answer(call.downstream, client_stall_seconds=self._timeouts.idle_seconds)
