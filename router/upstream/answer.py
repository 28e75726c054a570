"""One engine's answer to one attempt: taken from its connection as it comes, passed on as it comes.

    begun ──► head ──► body ──► complete        framing: length, chunks, or the connection's end
                          └──► broken / idle / stalled

In come the bytes of a connection (`received`, `connection_ended`) and deadlines (`overdue`); out go pieces of
the body: kept until `flow` names the client's side, from then on written to it inside the very callback that
brought them. A listener is told, once each, when the answer can be judged (first bytes of the body, or a
whole error) and when no more will come; whoever would rather wait takes `AnswerSignals` as the listener.
Back-pressure: while the client's side is blocked, the connection is not read.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

from router.upstream.headers import answer_headers
from router.upstream.relay import Outcome, Transform
from router.wire.chunks import SIZES, ChunkDecoder
from router.wire.response_head import HEAD_BYTES_MAX, AnswerHead, MalformedAnswer, parse_answer_head
from router.wire.task import Signal

if TYPE_CHECKING:
    from router.downstream import Downstream
    from router.upstream.connection import Connection

# Kept of a body that nobody takes yet, before the engine is held back. Error bodies are read this far
# before anything is decided; vLLM's have a few hundred bytes.
HELD_BYTES_MAX = 64 * 1024

_SWITCHING_PROTOCOLS = 101


class AnswerListener(Protocol):
    """Who is told of an answer."""

    def answer_ready(self) -> None:
        """The answer can be judged; called once, before `answer_ended`."""
        ...

    def answer_ended(self) -> None:
        """The answer has ended, as its `outcome` says; called once."""
        ...


class AnswerSignals:
    """Listener of a coroutine that waits.

    Attributes:
        ready: Set when the answer can be judged.
        ended: Set when it has ended.
    """

    __slots__ = ("ended", "ready")

    def __init__(self) -> None:
        self.ready = Signal()
        self.ended = Signal()

    def answer_ready(self) -> None:
        """The answer can be judged."""
        self.ready.set()

    def answer_ended(self) -> None:
        """The answer has ended."""
        self.ended.set()


class Answer:
    """The answer to one request on one connection.

    Attributes:
        status: HTTP status; 0 before the head has come.
        ready: It can be judged.
        outcome: How it ended; None before.
        failure: What broke it, for people.
        timed_out: It failed because its first byte did not come in time.
        begun: At least one byte has come.
    """

    __slots__ = (
        "_blocked", "_buffer", "_chunks", "_client_stall_seconds", "_connection", "_downstream", "_head",
        "_held", "_held_bytes", "_idle_seconds", "_left", "_listener", "_monotonic", "_paused",
        "_touched_seconds", "_transform", "begun", "failure", "outcome", "ready", "status", "timed_out",
    )  # fmt: skip

    def __init__(self, connection: Connection, listener: AnswerListener, *, idle_seconds: float) -> None:
        self.status = 0
        self.ready = False
        self._listener = listener
        self.outcome: Outcome | None = None
        self.failure = ""
        self.timed_out = False
        self.begun = False
        self._connection = connection
        self._monotonic = connection.monotonic
        self._idle_seconds = idle_seconds
        self._client_stall_seconds = idle_seconds
        self._head: AnswerHead | None = None
        self._buffer = b""
        self._chunks: ChunkDecoder | None = None
        self._left: int | None = None
        self._held: list[bytes] = []
        self._held_bytes = 0
        self._paused = False
        self._blocked = False
        self._touched_seconds = 0.0
        self._downstream: Downstream | None = None
        self._transform: Transform | None = None

    @property
    def headers(self) -> Mapping[str, str]:
        """As the engine sent them; empty before the head has come."""
        return {} if self._head is None else self._head.headers

    @property
    def client_headers(self) -> Mapping[str, str]:
        """Those of `headers` that are the client's business."""
        head = self._head
        if head is None:
            return {}
        if head.forwarded is None:
            # One head serves all answers that begin with the same bytes.
            head.forwarded = answer_headers(head.headers)
        return head.forwarded

    @property
    def length(self) -> int | None:
        """Bytes of the body as the engine promised them; None where it did not."""
        return None if self._head is None else self._head.length

    @property
    def head(self) -> bytes:
        """First bytes of the body: what has come before anybody took it."""
        return self._held[0] if len(self._held) == 1 else b"".join(self._held)

    def flow(
        self, downstream: Downstream, transform: Transform | None, *, client_stall_seconds: float
    ) -> None:
        """Has the body written to the client's side: what has come at once, what is to come as it comes."""
        self._downstream, self._transform = downstream, transform
        self._client_stall_seconds = client_stall_seconds
        if self.outcome is None:
            downstream.listener = self
        if self._held:
            piece = self._held[0] if len(self._held) == 1 else b"".join(self._held)
            self._held.clear()
            self._deliver(piece)
        if self._paused and not self._blocked:
            self._resume()

    def release(self) -> None:
        """Ends the attempt: an answer that has not ended is given up, and its connection closed."""
        self._finish(Outcome.CLIENT_GONE)

    # What the connection and the clock say.

    def received(self, data: bytes) -> None:
        """Takes the next bytes of the connection."""
        self._touched_seconds = self._monotonic()
        chunks = self._chunks
        if chunks is not None and chunks.at_start and self._downstream is not None:
            # An event of a stream mostly comes as one whole chunk, and goes on as the chunk that it is.
            cut = data.find(b"\r\n", 0, 8)
            size = SIZES.get(data[:cut])
            if size is not None and len(data) == cut + size + 4 and data.endswith(b"\r\n"):
                self._deliver(data[cut + 2 : -2], data)
                return
        self.begun = True
        try:
            if self._head is None:
                self._buffer += data
                if self._read_head():
                    data, self._buffer = self._buffer, b""
                    self._read_body(data)
            else:
                self._read_body(data)
        except MalformedAnswer as error:
            self._finish(Outcome.BROKEN, str(error))

    def connection_ended(self, error: Exception | None) -> None:
        """The connection is gone."""
        head = self._head
        if error is None and head is not None and head.ends_with_connection:
            self._finish(Outcome.COMPLETE)
        else:
            self._finish(Outcome.BROKEN, "the connection was closed" if error is None else str(error))

    def overdue(self) -> None:
        """What is waited for has not come in time."""
        now = self._monotonic()
        if not self.ready:
            self.timed_out = True
            self._finish(Outcome.BROKEN, "no first byte in time")
        elif self._blocked:
            self._finish(Outcome.CLIENT_STALLED)
        else:
            # Nobody reads what is held back, so that nothing can come.
            touched = now if self._paused else self._touched_seconds
            deadline = self._connection.deadline_seconds = touched + self._idle_seconds
            if deadline <= now:
                self._finish(Outcome.IDLE, "silence")

    # What the client's side says.

    def drained(self) -> None:
        """The client takes more."""
        if self._blocked:
            self._blocked = False
            if self.outcome is None:
                self._connection.deadline_seconds = self._monotonic() + self._idle_seconds
                self._resume()

    def lost(self) -> None:
        """The client has left."""
        self._finish(Outcome.CLIENT_GONE)

    def _read_head(self) -> bool:
        """Reads the head out of the buffer; False where it has not come completely."""
        while True:
            end = self._buffer.find(b"\r\n\r\n", 0, HEAD_BYTES_MAX)
            if end < 0:
                if len(self._buffer) >= HEAD_BYTES_MAX:
                    raise MalformedAnswer("the head of the answer is too long")
                return False
            head = parse_answer_head(self._buffer[: end + 4])
            self._buffer = self._buffer[end + 4 :]
            if head.status == _SWITCHING_PROTOCOLS:
                raise MalformedAnswer("the engine switches protocols unasked")
            if head.status >= 200:
                break
        self._head = head
        self.status = head.status
        self._left = head.length
        if head.chunked:
            self._chunks = ChunkDecoder()
        return True

    def _read_body(self, data: bytes) -> None:
        complete = False
        if self._chunks is not None:
            piece = self._chunks.feed(data)
            complete = self._chunks.complete
            if self._chunks.rest:
                self._connection.reusable = False
        elif self._left is None:
            piece = data
        else:
            piece = data
            if len(data) > self._left:
                # Bytes that nobody asked for: whatever they are, they are not the next answer.
                piece = data[: self._left]
                self._connection.reusable = False
            self._left -= len(piece)
            complete = not self._left
        if piece:
            self._deliver(piece)
        if complete:
            self._finish(Outcome.COMPLETE)
        elif self._held and (self.status < 400 or self._held_bytes >= HELD_BYTES_MAX):
            self._connection.deadline_seconds = self._touched_seconds + self._idle_seconds
            self._tell_ready()

    def _deliver(self, piece: bytes, framed: bytes = b"") -> None:
        downstream = self._downstream
        if downstream is None:
            self._held.append(piece)
            self._held_bytes += len(piece)
            if self._held_bytes > HELD_BYTES_MAX:
                self._pause()
            return
        if self._transform is not None:
            given = piece
            piece = self._transform.feed(given)
            if piece is not given:
                framed = b""
        downstream.write(piece, framed)
        if downstream.blocked and not self._blocked and self.outcome is None:
            self._blocked = True
            self._connection.deadline_seconds = self._monotonic() + self._client_stall_seconds
            self._pause()

    def _pause(self) -> None:
        if not self._paused and self.outcome is None:
            self._paused = True
            self._connection.pause()

    def _resume(self) -> None:
        if self._paused and self.outcome is None:
            self._paused = False
            self._connection.resume()

    def _finish(self, outcome: Outcome, failure: str = "") -> None:
        if self.outcome is not None:
            return
        self.outcome, self.failure = outcome, failure
        head = self._head
        if self._paused:
            self._connection.resume()
        self._connection.finished(
            reusable=outcome is Outcome.COMPLETE and head is not None and head.keep_alive
        )
        self._tell_ready()
        if self._downstream is not None:
            # The two would keep each other alive, and the collector of cycles looks seldom.
            self._downstream.listener = None
        self._listener.answer_ended()

    def _tell_ready(self) -> None:
        if not self.ready:
            self.ready = True
            self._listener.answer_ready()
