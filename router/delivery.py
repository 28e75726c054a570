"""Brings engines' answers to one client: asked for, metered, translated, and continued where an engine dies.

    body_for   what an engine is sent: the client's body, under the engine's model name, asking for usage
    begin      starts the client's answer, and has the engine's flow to it
    conclude   looks at what has come when it is over: the end, a broken stream, or one to be continued
    deliver    begin, wait, conclude; ends the client's, or says that another engine may go on
    abandon    ends the client's answer when none does

In come a request's facts and, attempt by attempt, an endpoint and its answer; out go bytes to the client's
side and the outcome. Which endpoint, how often, and who is to blame are the director's.
"""

from aiohttp import hdrs

from router.continuation.request import CONTINUING_ENGINES
from router.continuation.stream import ContinuedStream
from router.downstream import Downstream
from router.metering.request import RequestMeter
from router.metering.stream import Meter
from router.openai.body import ParsedBody
from router.openai.response_ids import name_response
from router.openai.routes import INFERENCE_ROUTES, RESPONSES, Route, Shape, shape_of
from router.openai.shapes import ErrorTranslator, closing_error, translated
from router.openai.sse import is_event_stream
from router.record import RequestRecord
from router.upstream.answer import Answer
from router.upstream.failures import AttemptFailed, Cause
from router.upstream.relay import Outcome, Transform, break_off, end_answer, finish_relay, start_answer
from router.view.view import Endpoint
from router.wire.task import Signal


class Delivery:
    """One request's answer.

    Attributes:
        meter: Counts what it uses.
        failure: How an engine failed whose answer the client has all the same.
    """

    __slots__ = (
        "_bodies", "_body", "_downstream", "_joined", "_parsed", "_record", "_route",
        "_stall_seconds", "failure", "meter",
    )  # fmt: skip

    def __init__(
        self,
        body: bytes,
        parsed: ParsedBody,
        *,
        downstream: Downstream,
        record: RequestRecord,
        client_stall_seconds: float,
    ) -> None:
        """Takes the request, its client's side, its account, and how long a client may take nothing."""
        self.failure: AttemptFailed | None = None
        self._route = INFERENCE_ROUTES.get(record.route) or Route(
            record.route, shape=shape_of(record.route), metered=False
        )
        self.meter = RequestMeter(
            record.route, parsed.document, stream=parsed.stream, metered=self._route.metered
        )
        self._body = body
        self._parsed = parsed
        self._downstream = downstream
        self._record = record
        self._stall_seconds = client_stall_seconds
        self._joined: ContinuedStream | None = None
        self._bodies: dict[tuple[str, str], bytes] = {}

    @property
    def continuations(self) -> int:
        """How often another engine was asked to go on with the stream."""
        return 0 if self._joined is None else self._joined.continuations

    def body_for(self, endpoint: Endpoint) -> bytes:
        """Returns what an engine is sent.

        Raises:
            AttemptFailed: The engine could not go on with the stream.
        """
        name = endpoint.served_model_name or self._parsed.model
        if self._joined is not None:
            if endpoint.engine not in CONTINUING_ENGINES:
                raise AttemptFailed(Cause.CONTINUATION_REFUSED, f"{endpoint.engine or 'the engine'} cannot")
            body = self._parsed.renamed(self._joined.next_body(), name)
            return self.meter.body_for(body, endpoint.engine)
        body = self._bodies.get((name, endpoint.engine), b"")
        if not body:
            body = self._body if name == self._parsed.model else self._parsed.renamed(self._body, name)
            body = self.meter.body_for(body, endpoint.engine)
            self._bodies[name, endpoint.engine] = body
        if self._route is RESPONSES:
            return name_response(body, self._parsed.document, endpoint)
        return body

    def translated(self, status: int, body: bytes) -> bytes:
        """Returns an engine's own error in the shape of the route."""
        return translated(self._route.shape, status, body, self._record.request_id)

    def begin(self, answer: Answer, endpoint: Endpoint, *, may_continue: bool) -> Transform | None:
        """Starts the client's answer, once, and has an engine's flow to it.

        Args:
            answer: Whose first bytes are there.
            endpoint: That gave it.
            may_continue: Another engine may go on with a stream that ends early.

        Returns:
            What the body goes through, for `conclude`.

        Raises:
            AttemptFailed: The engine does not go on with a stream that has started.
        """
        transform = self._start(answer, endpoint, may_continue=may_continue)
        answer.flow(self._downstream, transform, client_stall_seconds=self._stall_seconds)
        return transform

    def conclude(self, answer: Answer, transform: Transform | None) -> Outcome:
        """Writes what is left when an answer has ended: the client's lacks its end only, or is broken off.

        Raises:
            AttemptFailed: It ended early, and another engine may go on with it.
        """
        outcome = finish_relay(answer, self._downstream, transform)
        said = "The engine stopped sending."
        if outcome is Outcome.BROKEN:
            said = f"The engine's answer broke off: {answer.failure}"
        if self._joined is not None and outcome not in (Outcome.CLIENT_GONE, Outcome.CLIENT_STALLED):
            outcome = self._join(self._joined, answer, outcome)
        if outcome in (Outcome.BROKEN, Outcome.IDLE):
            if transform is not None:
                self._downstream.write(transform.finish())
            self._break_off(said)
        return outcome

    async def deliver(
        self, answer: Answer, ended: Signal, endpoint: Endpoint, *, may_continue: bool
    ) -> Outcome:
        """Relays an answer and ends the client's, completely or not.

        Args:
            answer: As of `begin`.
            ended: Set when it has ended.
            endpoint: As of `begin`.
            may_continue: As of `begin`.

        Raises:
            AttemptFailed: It ended early, and another engine may go on with it; or it does not go on.
        """
        transform = self.begin(answer, endpoint, may_continue=may_continue)
        await ended
        outcome = self.conclude(answer, transform)
        if outcome is Outcome.COMPLETE:
            return await self.end()
        return outcome

    async def end(self) -> Outcome:
        """Completes the client's answer and waits until the client has taken it, but for a bounded rest."""
        return await end_answer(self._downstream, client_stall_seconds=self._stall_seconds)

    async def abandon(self, failure: AttemptFailed | None) -> bool:
        """Ends a stream that no engine goes on with, as an error.

        Returns:
            True where the error is an engine's own word.
        """
        if self._joined is not None:
            self._downstream.write(self._joined.give_up())
            if self._joined.ended:
                await self.end()
                return True
        self._break_off("The engine's answer broke off." if failure is None else str(failure))
        return False

    def _break_off(self, message: str) -> None:
        tail = self._downstream.tail
        break_off(self._downstream, closing_error(self._route.shape, message, tail=tail))

    def _start(self, answer: Answer, endpoint: Endpoint, *, may_continue: bool) -> Transform | None:
        """Starts the client's answer, once, and returns what its body goes through.

        Raises:
            AttemptFailed: The engine does not go on with a stream that has started.
        """
        headers = answer.headers
        content_type = headers.get(hdrs.CONTENT_TYPE, "")
        if self._joined is not None:
            if answer.status != 200 or not is_event_stream(content_type):
                raise AttemptFailed(Cause.CONTINUATION_REFUSED, f"the engine answered {answer.status}")
            return self._joined
        if answer.status >= 400 and self._route.shape is Shape.ANTHROPIC:
            translator = ErrorTranslator(self._route.shape, answer.status, self._record.request_id)
            start_answer(answer, self._downstream, self._record, keeps_length=False)
            return translator
        encoding = headers.get(hdrs.CONTENT_ENCODING, "")
        meter: Meter | None = self.meter.begin(answer.status, content_type, encoding)
        start_answer(answer, self._downstream, self._record, keeps_length=not self.meter.changes_length)
        if may_continue and endpoint.engine in CONTINUING_ENGINES:
            self._joined = self.meter.joins()
        return self._joined or meter

    def _join(self, joined: ContinuedStream, answer: Answer, outcome: Outcome) -> Outcome:
        """Looks where an answer has left the client's stream: at its end, or to be continued.

        Raises:
            AttemptFailed: To be continued.
        """
        if joined.ended:
            return Outcome.COMPLETE
        cause = Cause.STREAM_BROKEN if outcome is Outcome.BROKEN else Cause.STREAM_FAILED
        failure = AttemptFailed(cause, joined.failure or answer.failure or "the stream has no end")
        rest = joined.close()
        if rest is not None:
            # Nothing is missing but the end; the engine has failed all the same.
            self.failure = failure
            self._downstream.write(rest)
            return Outcome.COMPLETE
        if joined.interrupt():
            raise failure
        self._downstream.write(joined.give_up())
        return Outcome.BROKEN if outcome is Outcome.COMPLETE and not joined.ended else outcome
