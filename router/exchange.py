"""One request of the hot path, from its head to the end of its answer.

    body there, understood, endpoint with room, connection at hand
       ├─ all yes ─► sent; two callbacks are left: the answer can be judged ─► it flows to the client
       │                                           the answer has ended     ─► accounts are closed
       └─ no, or the attempt fails ─► the director's coroutine takes over, in a task

In come a request and its client's side, out goes an answer: the engine's, or a refusal in the shape of the
route. Nearly every request waits for nothing but its engine, and needs no task for that: a task costs more
than all that a request counts. It decides nothing about requests: whatever is not plain is the director's.
"""

import asyncio
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any

import structlog

from router.attempts import Attempt
from router.call import Call
from router.director import Admission
from router.metering.usage import UsageOutcome
from router.openai import errors
from router.openai.errors import Reason, Refusal
from router.picking.contract import Candidate
from router.record import CLIENT_CLOSED_REQUEST, RequestRecord
from router.upstream.answer import Answer
from router.upstream.failures import AttemptFailed
from router.upstream.forward import judged
from router.upstream.relay import Outcome, Transform
from router.wire.downstream import WireDownstream
from router.wire.request import WireRequest
from router.wire.task import EagerTask

if TYPE_CHECKING:
    from router.serving import WireServing

_log = structlog.get_logger(__name__)


class Exchange:
    """Serves one request, as `router.wire.connection.Serving`; an `AnswerListener` of its engine's answer.

    Attributes:
        done: It has ended.
    """

    __slots__ = (
        "_admission", "_answer", "_attempt", "_call", "_candidate", "_downstream", "_flowing",
        "_limit_seconds", "_on_done", "_record", "_request", "_sent_seconds", "_serving", "_task",
        "_transform", "done",
    )  # fmt: skip

    def __init__(
        self,
        serving: "WireServing",
        request: WireRequest,
        downstream: WireDownstream,
        record: RequestRecord,
        on_done: Callable[[], None],
    ) -> None:
        """Takes the request, its client's side, its account, and what to call when it has ended."""
        self.done = False
        self._serving = serving
        self._request = request
        self._downstream = downstream
        self._record = record
        self._on_done = on_done
        self._admission: Admission | None = None
        self._task: EagerTask | None = None
        self._call: Call | None = None
        self._candidate: Candidate | None = None
        self._attempt: Attempt | None = None
        self._answer: Answer | None = None
        self._transform: Transform | None = None
        self._flowing = False
        self._sent_seconds = 0.0
        self._limit_seconds = 0.0

    def start(self) -> None:
        """Serves the request as far as that goes without waiting."""
        surface, request, record = self._serving.surface, self._request, self._record
        if request.missing_bytes or request.head.length > surface.body_bytes_max:
            self._run(surface.infer(request, record, self._downstream))
            return
        try:
            tenant = surface.authenticate(request.head.headers, record)
            self._admission = self._serving.director.admit()
            call = surface.understand(request, tenant, request.body(), record, self._downstream)
            self._send(call)
        except Exception as error:  # noqa: BLE001 - the client gets an answer in any case, the operator the trace
            self._fail(error)

    def cancel(self) -> None:
        """Ends it: its client has left."""
        if self.done:
            return
        if self._task is not None:
            self._task.cancel()
            return
        call, answer = self._call, self._answer
        self._leave_attempt()
        if answer is not None:
            # Its engine is told by a closed connection.
            answer.release()
        if call is not None:
            call.delivery.meter.outcome = UsageOutcome.CLIENT_GONE
            self._serving.director.attempts.settle(call)
        self._record.status, self._record.reason = CLIENT_CLOSED_REQUEST, Reason.CLIENT_DISCONNECTED
        self._end()

    # What the answer says.

    def answer_ready(self) -> None:
        """The answer can be judged: it flows to the client, or the director tries elsewhere."""
        answer, call, attempt = self._answer, self._call, self._attempt
        if answer is None or call is None or attempt is None:
            return
        try:
            self._judge(answer, call, attempt)
        except Exception as error:  # noqa: BLE001 - as in `start`
            self._fail(error)

    def answer_ended(self) -> None:
        """The answer has ended: so does the client's."""
        answer, call, attempt = self._answer, self._call, self._attempt
        if not self._flowing or answer is None or call is None or attempt is None:
            return
        try:
            outcome = call.delivery.conclude(answer, self._transform)
            self._answer = self._attempt = self._call = None
            if outcome is Outcome.COMPLETE:
                if self._downstream.blocked:
                    self._run(self._drain(call, attempt))
                    return
                self._downstream.end()
            self._settle(call, attempt, outcome)
            self._end()
        except Exception as error:  # noqa: BLE001 - as in `start`
            self._fail(error)

    def _send(self, call: Call) -> None:
        """Sends a request at once where nothing has to be waited for; else the director does."""
        director, forwarder = self._serving.director, self._serving.director.forwarder
        candidate = director.begin(call)
        if candidate is None or (call.parsed.stream and director.continues(candidate.endpoint)):
            self._run(director.forward(call, candidate))
            return
        endpoint = candidate.endpoint
        connection = forwarder.kept_connection(endpoint)
        if connection is None:
            self._run(director.forward(call, candidate))
            return
        body, headers = call.delivery.body_for(endpoint), director.headers_for(call)
        self._call, self._candidate = call, candidate
        self._attempt = director.attempts.open(call, candidate)
        self._limit_seconds = forwarder.timeouts.until_first_byte(stream=call.parsed.stream)
        self._sent_seconds = forwarder.monotonic()
        answer = self._answer = forwarder.answer_on(connection, self)
        forwarder.send(
            connection,
            answer,
            endpoint,
            call.path,
            body=body,
            headers=headers,
            deadline_seconds=self._sent_seconds + self._limit_seconds,
        )

    def _judge(self, answer: Answer, call: Call, attempt: Attempt) -> None:
        director = self._serving.director
        if director.forwarder.stale(answer, self._sent_seconds):
            self._hand_over(director.forward(call, self._candidate, attempt=attempt))
            return
        try:
            judged(answer, self._limit_seconds)
        except AttemptFailed as error:
            attempt.close()
            director.attempts.failed(call, attempt.endpoint, error)
            self._hand_over(director.forward(call, failure=error))
            return
        director.attempts.answered(call, attempt, answer)
        self._flowing = True
        self._transform = call.delivery.begin(answer, attempt.endpoint, may_continue=False)

    async def _drain(self, call: Call, attempt: Attempt) -> None:
        """Waits until the client has taken its answer, but for a bounded rest."""
        outcome = Outcome.CLIENT_GONE
        try:
            outcome = await call.delivery.end()
        finally:
            self._settle(call, attempt, outcome)

    def _settle(self, call: Call, attempt: Attempt, outcome: Outcome) -> None:
        attempts = self._serving.director.attempts
        attempt.close()
        try:
            attempts.ended(call, attempt.endpoint, outcome)
        finally:
            attempts.settle(call)

    # How it ends.

    def _hand_over(self, coroutine: Coroutine[Any, Any, None]) -> None:
        """Leaves an attempt that failed to the director."""
        self._answer = self._attempt = self._call = None
        self._run(coroutine)

    def _run(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = EagerTask(coroutine, self._serving.loop, self._ran)
        if not task.done:
            self._task = task

    def _ran(self, error: BaseException | None) -> None:
        """The task has ended."""
        self._task = None
        if isinstance(error, asyncio.CancelledError):
            self._record.status, self._record.reason = CLIENT_CLOSED_REQUEST, Reason.CLIENT_DISCONNECTED
        elif isinstance(error, Exception):
            self._refuse(error)
        self._end()

    def _fail(self, error: Exception) -> None:
        """Ends a request that nothing can be done for: refused, or failed inside the router."""
        call, answer = self._call, self._answer
        self._leave_attempt()
        if answer is not None:
            answer.release()
        if call is not None:
            self._serving.director.attempts.settle(call)
        self._refuse(error)
        self._end()

    def _leave_attempt(self) -> None:
        if self._attempt is not None:
            self._attempt.close()
        self._flowing = False
        self._answer = self._attempt = self._call = None

    def _refuse(self, error: Exception) -> None:
        refusal = error if isinstance(error, Refusal) else errors.internal_error()
        if refusal is not error:
            _log.error("request failed inside the router", request_id=self._record.request_id, exc_info=error)
        self._serving.refuse(refusal, self._record, self._downstream)

    def _end(self) -> None:
        if self.done:
            return
        self.done = True
        if self._admission is not None:
            self._admission.leave()
        self._serving.ended(self._record)
        self._on_done()
