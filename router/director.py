"""The way of a request: authenticate -> admit -> candidates -> pick -> forward -> account.

In comes a client's request, out goes an answer: the engine's, or a `Refusal` to be sent. Everything is
decided from the view and from this process's own counts: no store and no DNS is asked. Another endpoint
is tried only before the first byte has gone to the client (law 6).
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import structlog
from aiohttp import web

from core.clock import Clock
from core.identity import bearer_token, hash_secret
from router.metrics import RouterMetrics
from router.openai import errors
from router.openai.body import ParsedBody, rename_model
from router.openai.errors import Reason
from router.picking.contract import Candidate, RequestContext, Strategy
from router.picking.eligibility import eligible
from router.picking.selector import Selector
from router.prefix.exact.index import ExactIndex
from router.record import CLIENT_CLOSED_REQUEST, RequestRecord
from router.upstream.budget import RetryBudget
from router.upstream.failures import AttemptFailed, Cause, Owner
from router.upstream.forward import Forwarder, Timeouts
from router.upstream.headers import ENDPOINT_HEADER, request_headers
from router.upstream.health import EndpointHealth
from router.upstream.loads import LoadTable
from router.upstream.relay import Outcome, relay
from router.view.source import ViewSource
from router.view.view import Deployment, Endpoint, Miss, Tenant, View

_log = structlog.get_logger(__name__)

# Three engines that fail one after the other are no accident that a fourth attempt would mend.
ATTEMPTS_MAX = 3
# A replacement that is about to be published arrives within this, or not in the client's interest.
FRESH_ENDPOINT_WAIT_SECONDS = 1.0


@dataclass(slots=True)
class Call:
    """A request that has been admitted and understood.

    Attributes:
        request: The client's.
        record: Its account.
        context: What plug-ins may know.
        parsed: What the body says.
        tried: Identities of the endpoints that failed it.
        attempts: How many that were.
        deadline_seconds: End of the wait for a fresh endpoint; None before it began.
    """

    request: web.Request
    record: RequestRecord
    context: RequestContext
    parsed: ParsedBody
    tried: set[tuple[str, str]] = field(default_factory=set)
    attempts: int = 0
    deadline_seconds: float | None = None
    _renamed: dict[str, bytes] = field(default_factory=dict)

    def body_for(self, endpoint: Endpoint) -> bytes:
        """Returns the body with the model name that an engine knows; the very bytes where it does."""
        name = endpoint.served_model_name
        if not name or name == self.parsed.model:
            return self.context.body
        if name not in self._renamed:
            self._renamed[name] = rename_model(self.context.body, name)
        return self._renamed[name]


class Director:
    """Serves requests. One a worker.

    Attributes:
        loads: Requests in flight by replica.
        health: Which endpoints are left alone.
        selector: Picks among the others.
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
        exact: ExactIndex | None = None,
    ) -> None:
        self.loads = loads
        self.health = EndpointHealth(clock)
        self.budget = RetryBudget(clock)
        self._source = source
        # One for all selectors: it follows endpoints, whatever picks among them.
        self._exact = exact
        self.selector = Selector(strategy, loads=loads, samples=source.samples, exact=exact)
        self._forwarder = forwarder
        self._timeouts = timeouts
        self._metrics = metrics
        self._clock = clock
        self._admitted = 0
        self._admitted_max = requests_in_flight_max
        source.subscribe(self._view_changed)

    def _view_changed(self, view: View) -> None:
        self.health.retain(view.endpoints)
        self.loads.retain({endpoint.replica for endpoint in view.endpoints})
        self.selector.retain(view.endpoints)
        if self._exact is not None:
            self._exact.follower.view_changed(view.endpoints)
        self._metrics.view_changed(view)

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
        tenant = view.authenticate(hash_secret(token))
        if tenant is None:
            raise errors.api_key_invalid()
        record.namespace = tenant.name
        return tenant

    @contextmanager
    def admit(self) -> Iterator[None]:
        """Lets a request in for as long as the block runs.

        Raises:
            Refusal: This worker holds as many as it may.
        """
        if self._admitted >= self._admitted_max:
            raise errors.router_overloaded(self._admitted_max)
        self._admitted += 1
        try:
            yield
        finally:
            self._admitted -= 1

    def resolve(self, tenant: Tenant, model: str) -> Deployment:
        """Finds the deployment that a model name means.

        Raises:
            Refusal: There is none, or there are several.
        """
        found = tenant.resolve(model)
        if found is Miss.AMBIGUOUS:
            raise errors.model_ambiguous(model, tenant.declared[model])
        if isinstance(found, Miss):
            raise errors.model_not_found(model)
        return found

    async def forward(self, call: Call) -> web.StreamResponse:
        """Sends a request to one endpoint after the other until one answers.

        Raises:
            Refusal: None did.
        """
        self.budget.request()
        if self._exact is not None:
            await self._read_exactly(call)
        failure: AttemptFailed | None = None
        while True:
            candidate = self._choose(call)
            if candidate is None and failure is not None:
                candidate = await self._await_fresh(call)
            if candidate is None:
                return self._give_up(call, failure)
            if failure is not None:
                if not self.budget.take():
                    raise errors.retry_budget_exhausted(call.parsed.model, failure.cause.value)
                self._metrics.retried(failure.cause)
            try:
                return await self._attempt(call, candidate)
            except AttemptFailed as error:
                failure = error
                self._failed(call, candidate.endpoint, error)
            if not failure.retryable or call.attempts >= ATTEMPTS_MAX:
                return self._give_up(call, failure)

    async def _read_exactly(self, call: Call) -> None:
        deployment = self._source.view.deployment(call.context.namespace, call.context.deployment)
        if deployment is not None:
            await self.selector.read_exactly(call.context, call.parsed.document, deployment.endpoints)

    def _choose(self, call: Call) -> Candidate | None:
        deployment = self._source.view.deployment(call.context.namespace, call.context.deployment)
        if deployment is None:
            return None
        usable = eligible(
            deployment.endpoints,
            tried=call.tried,
            is_ejected=self.health.is_ejected,
            last_failure_seconds=self.health.last_failure_seconds,
        )
        return self.selector.choose(call.context, usable)

    async def _await_fresh(self, call: Call) -> Candidate | None:
        if call.deadline_seconds is None:
            call.deadline_seconds = self._clock.monotonic() + FRESH_ENDPOINT_WAIT_SECONDS
        while True:
            version = self._source.view.version
            candidate = self._choose(call)
            remaining = call.deadline_seconds - self._clock.monotonic()
            if candidate is not None or remaining <= 0:
                return candidate
            await self._source.wait_changed(version, remaining)

    async def _attempt(self, call: Call, candidate: Candidate) -> web.StreamResponse:
        endpoint, record = candidate.endpoint, call.record
        record.endpoint, record.node = endpoint.replica, endpoint.node
        call.tried.add(endpoint.identity)
        call.attempts += 1
        record.attempts = call.attempts
        body = call.body_for(endpoint)
        headers = request_headers(
            call.request.headers, request_id=record.request_id, trace_parent=record.trace_parent
        )
        with self.health.probe(endpoint), self.selector.send(call.context, candidate) as flight:
            async with self._forwarder.attempt(
                endpoint, call.request.path_qs, body=body, headers=headers, stream=call.parsed.stream
            ) as answer:
                flight.first_byte()
                record.first_byte_seconds = self._clock.monotonic() - record.started_seconds
                record.status = answer.status
                if answer.status >= 400:
                    self._metrics.upstream_error(Owner.CLIENT if answer.status < 500 else Owner.ENGINE)
                self.health.succeeded(endpoint)
                response, outcome = await relay(
                    call.request, answer, record, client_stall_seconds=self._timeouts.idle_seconds
                )
        self._account(call, endpoint, outcome)
        return response

    def _account(self, call: Call, endpoint: Endpoint, outcome: Outcome) -> None:
        match outcome:
            case Outcome.COMPLETE:
                return
            case Outcome.CLIENT_GONE:
                call.record.reason = Reason.CLIENT_DISCONNECTED
                call.record.status = CLIENT_CLOSED_REQUEST
                self._metrics.upstream_error(Owner.CLIENT)
            case Outcome.CLIENT_STALLED:
                call.record.reason = Reason.CLIENT_STALLED
                self._metrics.upstream_error(Owner.CLIENT)
            case Outcome.BROKEN:
                call.record.reason = Reason.UPSTREAM_BROKEN
                self._metrics.upstream_error(Owner.TRANSPORT)
                self.health.failed(endpoint)
            case Outcome.IDLE:
                call.record.reason = Reason.IDLE_TIMEOUT
                self._metrics.upstream_error(Owner.ENGINE)
                self.health.failed(endpoint)

    def _failed(self, call: Call, endpoint: Endpoint, error: AttemptFailed) -> None:
        self._metrics.upstream_error(error.owner)
        ejection = self.health.failed(endpoint)
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

    def _give_up(self, call: Call, failure: AttemptFailed | None) -> web.StreamResponse:
        """Answers a request that no endpoint took: passes on the engine's word or refuses."""
        model = call.parsed.model
        if failure is None:
            deployment = self._source.view.deployment(call.context.namespace, call.context.deployment)
            states = Counter(each.state.name for each in deployment.endpoints) if deployment else {}
            raise errors.no_endpoint(model, states)
        if failure.answer is not None:
            call.record.reason = Reason.ENGINE_ERROR
            return web.Response(
                status=failure.answer.status,
                body=failure.answer.body,
                headers={
                    "Content-Type": failure.answer.content_type,
                    "Retry-After": str(errors.RETRY_AFTER_SECONDS),
                    errors.REASON_HEADER: Reason.ENGINE_ERROR.value,
                    ENDPOINT_HEADER: call.record.endpoint,
                },
            )
        if failure.cause is Cause.FIRST_BYTE_TIMEOUT:
            raise errors.first_byte_timeout(self._timeouts.until_first_byte(stream=call.parsed.stream))
        if failure.cause is Cause.CONNECT_TIMEOUT:
            raise errors.connect_timeout(self._timeouts.connect_seconds)
        raise errors.all_endpoints_failed(model, call.attempts, failure.cause.value)
