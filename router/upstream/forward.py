"""One attempt at one engine, up to its first byte, and the rest of its answer after that.

In come an endpoint, headers and a body; out comes an `Answer` whose first bytes have arrived, or an
`AttemptFailed`. An attempt ends in exactly one of three ways: read to the end, broken, or aborted, and
in the last two its connection is closed, which makes the engine drop the request. It decides nothing
about retries.
"""

from collections.abc import Callable
from dataclasses import dataclass

from aiohttp import hdrs

from core.clock import Clock
from router.upstream.answer import Answer, AnswerListener, AnswerSignals
from router.upstream.connection import Connection
from router.upstream.failures import AttemptFailed, Cause, ErrorAnswer, cause_of_answer
from router.upstream.pool import UpstreamPool
from router.upstream.relay import Outcome
from router.view.view import Endpoint

# A kept connection that the engine had closed fails within a round trip; what fails later was at work.
STALE_SECONDS = 0.5


@dataclass(frozen=True, slots=True)
class Timeouts:
    """Bounds of an attempt, in seconds.

    Attributes:
        connect_seconds: Until the connection stands.
        first_byte_seconds: Until the first byte of the body, for streams.
        whole_answer_seconds: The same for answers that come in one piece when the engine is done.
        idle_seconds: Between two pieces of the body.
    """

    connect_seconds: float
    first_byte_seconds: float
    whole_answer_seconds: float
    idle_seconds: float

    def until_first_byte(self, *, stream: bool) -> float:
        """Returns the bound until the first byte."""
        return self.first_byte_seconds if stream else self.whole_answer_seconds


class Forwarder:
    """Makes attempts.

    Attributes:
        timeouts: Bounds of each.
        monotonic: The clock.
    """

    def __init__(
        self, pool: UpstreamPool, timeouts: Timeouts, clock: Clock, *, on_stale: Callable[[], None]
    ) -> None:
        """Takes what to call when a request is sent again because its connection had gone stale."""
        self.timeouts = timeouts
        self._pool = pool
        self.monotonic = clock.monotonic
        self._on_stale = on_stale

    def kept_connection(self, endpoint: Endpoint) -> Connection | None:
        """Takes a connection that stands already; None without one."""
        try:
            return self._pool.origin(endpoint.url).take()
        except AttemptFailed:
            # Nothing stands where a URL leads nowhere; `attempt` says so.
            return None

    def answer_on(self, connection: Connection, listener: AnswerListener) -> Answer:
        """Makes what takes the answer to the request that is sent on a connection next."""
        return Answer(connection, listener, idle_seconds=self.timeouts.idle_seconds)

    def send(
        self,
        connection: Connection,
        answer: Answer,
        endpoint: Endpoint,
        path: str,
        *,
        body: bytes,
        headers: bytes,
        deadline_seconds: float,
        method: str = "POST",
    ) -> None:
        """Sends a request; the answer's listener may be told of its end before this returns.

        Args:
            connection: Of the endpoint, unused.
            answer: Takes what comes back.
            endpoint: Where to.
            path: Route, with its query.
            body: Sent byte for byte.
            headers: Lines, sent as they are; those of the host and of the body's length are added.
            deadline_seconds: Until the answer can be judged, on the monotonic clock.
            method: Of HTTP.
        """
        origin = self._pool.origin(endpoint.url)
        head = b"%b%b%b%b%bcontent-length: %d\r\n\r\n" % (
            method.encode(),
            origin.before_path,
            path.encode(),
            origin.after_path,
            headers,
            len(body),
        )
        connection.send(answer, head, body, deadline_seconds=deadline_seconds)

    def stale(self, answer: Answer, sent_seconds: float) -> bool:
        """Tells whether the engine had closed a kept connection before it saw the request.

        The same engine gets it once more then, on a connection of its own.
        """
        if answer.begun or answer.timed_out or self.monotonic() - sent_seconds >= STALE_SECONDS:
            return False
        self._on_stale()
        return True

    async def attempt(
        self,
        endpoint: Endpoint,
        path: str,
        *,
        body: bytes,
        headers: bytes,
        stream: bool,
        method: str = "POST",
        fresh: bool = False,
    ) -> tuple[Answer, AnswerSignals]:
        """Sends a request and returns the answer once its first byte is there, and what tells of its end.

        The caller must call the answer's `release`, whatever happens.

        Args:
            endpoint: Where to.
            path: As of `send`, and so are body, headers and method.
            body: See there.
            headers: See there.
            stream: True when the client asked for a stream.
            method: See there.
            fresh: On a new connection in any case.

        Raises:
            AttemptFailed: There will be no first byte, or the engine says that it does not serve.
        """
        started = self.monotonic()
        limit = self.timeouts.until_first_byte(stream=stream)
        connection = None if fresh else self.kept_connection(endpoint)
        while True:
            kept = connection is not None
            if connection is None:
                connection = await self._pool.connect(self._pool.origin(endpoint.url))
            signals = AnswerSignals()
            answer = self.answer_on(connection, signals)
            try:
                self.send(
                    connection,
                    answer,
                    endpoint,
                    path,
                    body=body,
                    headers=headers,
                    deadline_seconds=started + limit,
                    method=method,
                )
                await signals.ready
            except BaseException:
                answer.release()
                raise
            if kept and self.stale(answer, started):
                connection = None
                continue
            return judged(answer, limit), signals


def judged(answer: Answer, limit_seconds: float) -> Answer:
    """Returns an answer that the client can have.

    Raises:
        AttemptFailed: It is none.
    """
    head = answer.head
    outcome = answer.outcome
    if answer.timed_out:
        raise AttemptFailed(Cause.FIRST_BYTE_TIMEOUT, f"silent for {limit_seconds:g} s")
    if outcome is Outcome.BROKEN and (not head or answer.status >= 400):
        raise AttemptFailed(Cause.DISCONNECTED, answer.failure)
    cause = cause_of_answer(answer.status, head)
    if cause is not None:
        error = _error_answer(answer, head)
        answer.release()
        raise AttemptFailed(cause, f"the engine answered {answer.status}", answer=error)
    return answer


def _error_answer(answer: Answer, head: bytes) -> ErrorAnswer | None:
    # Only these are of use to a client; the 500s speak of an engine that it need not know of.
    if answer.status not in (502, 503) or not head or answer.outcome is not Outcome.COMPLETE:
        return None
    return ErrorAnswer(
        status=answer.status,
        content_type=answer.headers.get(hdrs.CONTENT_TYPE, "application/json"),
        body=head,
    )
