"""The way of a request: authenticate -> admit -> candidates -> pick -> forward -> account.

    begin      what every request starts with; an endpoint where it needs to wait for nothing
    forward    the rest, with all that a request may have to wait for

In comes a client's request, out goes an answer: the engine's, or a `Refusal` to be sent. Everything is
decided from the view and from this process's own counts: no store and no DNS is asked. A request that finds
no room waits at the gate, once; where that does not help, its deployment's fall-back serves it. Another
endpoint is tried only before the first byte has gone to the client (law 6).
"""

import asyncio
from types import TracebackType
from typing import Self

from core.clock import Clock
from router.admission.gate import Bounds, NotServed
from router.admission.refusals import refusal_of, states_of
from router.admission.split import Splitter
from router.admission.waiter import waiter_of
from router.attempts import Attempt, Attempts
from router.call import Call
from router.candidates import Candidates
from router.delivery import Delivery
from router.downstream import Downstream
from router.metering.usage import UsageOutcome, UsageSink
from router.metrics import RouterMetrics
from router.openai import errors
from router.openai.body import ParsedBody
from router.openai.errors import Reason
from router.picking.contract import Candidate, Strategy
from router.prefix.exact.index import ExactIndex
from router.record import RequestRecord
from router.upstream.budget import RetryBudget
from router.upstream.failures import AttemptFailed, Cause, ErrorAnswer
from router.upstream.forward import Forwarder
from router.upstream.headers import ENDPOINT_HEADER, request_headers
from router.upstream.health import EndpointHealth
from router.upstream.loads import LoadTable
from router.upstream.relay import end_answer
from router.view.source import ViewSource
from router.view.view import Alias, Deployment, Endpoint, Miss, Tenant, View

# Three engines that fail one after the other are no accident that a fourth attempt would mend.
ATTEMPTS_MAX = 3
# A replacement that is about to be published arrives within this, or not in the client's interest.
FRESH_ENDPOINT_WAIT_SECONDS = 1.0


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

    def leave(self) -> None:
        """Counts a request out."""
        self._held -= 1

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.leave()


class Director:
    """Serves requests. One a worker.

    Attributes:
        loads: Requests in flight by replica.
        health: Which endpoints are left alone.
        candidates: Who can take a request.
        attempts: What each attempt counts.
        forwarder: Makes them.
        budget: Of retries.
    """

    def __init__(
        self,
        *,
        source: ViewSource,
        strategy: Strategy,
        forwarder: Forwarder,
        loads: LoadTable,
        metrics: RouterMetrics,
        clock: Clock,
        requests_in_flight_max: int,
        bounds: Bounds,
        exact: ExactIndex | None = None,
        usage_sink: UsageSink | None = None,
    ) -> None:
        """Takes what it works with; usage goes to the metrics where no other sink is given."""
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
        self.attempts = Attempts(
            source=source,
            candidates=self.candidates,
            health=self.health,
            metrics=metrics,
            clock=clock,
            usage_sink=usage_sink,
        )
        self._splitter = Splitter()
        # One for all selectors: it follows endpoints, whatever picks among them.
        self._exact = exact
        self.forwarder = forwarder
        self._timeouts = forwarder.timeouts
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

    def authenticate(self, key_hash: str, record: RequestRecord) -> Tenant:
        """Finds out whose request it is.

        Args:
            key_hash: Of the key that it shows; empty for none.
            record: Gets tenant and tier.

        Raises:
            Refusal: No key, an unknown key, or no view yet.
        """
        view = self._source.view
        if not view.synced:
            raise errors.view_not_synced()
        if not key_hash:
            raise errors.api_key_missing()
        found = view.authenticate(key_hash)
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

    def begin(self, call: Call) -> Candidate | None:
        """Counts a request in and chooses its endpoint; None where it has to wait for something before.

        What is chosen must be sent to before the next await.
        """
        self.budget.request()
        lane = self.candidates.lane(call)
        lane.count_in(call.record.started_seconds)
        if self._exact is not None or lane.busy:
            return None
        return self.candidates.pick(call)

    async def forward(
        self,
        call: Call,
        candidate: Candidate | None = None,
        *,
        attempt: Attempt | None = None,
        failure: AttemptFailed | None = None,
    ) -> None:
        """Sends a request that has begun to one endpoint after the other until one answers, and relays that.

        Args:
            call: The request.
            candidate: Where to first; None to choose.
            attempt: At the candidate, which counts already and is to be sent on a new connection.
            failure: How an attempt without a task has ended; None without one.

        Raises:
            Refusal: None did.
        """
        try:
            await self._forward(call, candidate, attempt, failure)
        except asyncio.CancelledError:
            # The client has left; whatever has gone to it counts.
            call.delivery.meter.outcome = UsageOutcome.CLIENT_GONE
            raise
        finally:
            self.attempts.settle(call)

    async def _forward(
        self,
        call: Call,
        candidate: Candidate | None,
        attempt: Attempt | None,
        failure: AttemptFailed | None,
    ) -> None:
        if self._exact is not None:
            await self._read_exactly(call)
        while True:
            if failure is not None and not self._may_retry(call, failure):
                await self._give_up(call, failure)
                return
            if candidate is None:
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
                await self._attempt(call, candidate, attempt)
                return
            except AttemptFailed as error:
                failure = error
                if call.downstream.started:
                    call.deadline_seconds = None
                self.attempts.failed(call, candidate.endpoint, error)
            candidate = attempt = None

    @staticmethod
    def _may_retry(call: Call, failure: AttemptFailed) -> bool:
        return failure.retryable and call.attempts < ATTEMPTS_MAX + call.delivery.continuations

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

    async def _attempt(self, call: Call, candidate: Candidate, attempt: Attempt | None) -> None:
        endpoint, fresh = candidate.endpoint, attempt is not None
        body = call.delivery.body_for(endpoint)
        attempt = attempt or self.attempts.open(call, candidate)
        try:
            answer, signals = await self.forwarder.attempt(
                endpoint,
                call.path,
                body=body,
                headers=self.headers_for(call),
                stream=call.parsed.stream,
                method=call.method,
                fresh=fresh,
            )
            try:
                self.attempts.answered(call, attempt, answer)
                outcome = await call.delivery.deliver(
                    answer, signals.ended, endpoint, may_continue=self.continues(endpoint)
                )
            finally:
                answer.release()
        finally:
            attempt.close()
        self.attempts.ended(call, endpoint, outcome)

    @staticmethod
    def headers_for(call: Call) -> bytes:
        """Returns the header lines that an engine is sent."""
        return request_headers(
            call.headers, request_id=call.record.request_id, trace_parent=call.record.trace_parent
        )

    def continues(self, endpoint: Endpoint) -> bool:
        """Tells whether streams of an endpoint go on elsewhere when it dies."""
        deployment = self._source.view.deployment(endpoint.namespace, endpoint.deployment)
        return deployment is not None and deployment.routing.stream_continuation

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
