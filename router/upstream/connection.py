"""One connection to an engine: carries one request at a time.

In come a request's bytes (`send`) and what the socket says; out go the bytes of the answer to whoever waits
for it (`Answer`), and the connection itself to the pool when that answer is complete and another may follow.
It knows nothing of HTTP.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, cast

from router.wire.deadlines import NEVER
from router.wire.outbox import Outbox

if TYPE_CHECKING:
    from router.upstream.answer import Answer
    from router.upstream.pool import Origin

# A head and a body up to this size go out as one buffer; larger bodies are not copied.
_JOINED_BYTES_MAX = 64 * 1024


class Connection:
    """A connection and who waits for its bytes; a protocol of asyncio, though none of its classes.

    Attributes:
        reusable: Another request may follow.
        deadline_seconds: Of what is waited for: an answer's bytes, or the next request.
        monotonic: The clock.
    """

    __slots__ = ("_answer", "_origin", "_outbox", "_transport", "deadline_seconds", "monotonic", "reusable")

    def __init__(self, origin: Origin, outbox: Outbox, monotonic: Callable[[], float]) -> None:
        """Takes where the connection goes between requests, and what writes to it."""
        self.reusable = True
        self.deadline_seconds = NEVER
        self.monotonic = monotonic
        self._answer: Answer | None = None
        self._origin = origin
        self._outbox = outbox
        self._transport: asyncio.Transport | None = None

    def send(self, answer: Answer, head: bytes, body: bytes, *, deadline_seconds: float) -> None:
        """Sends a request; `answer` gets what comes back, until the deadline."""
        self._answer = answer
        self.deadline_seconds = deadline_seconds
        transport = self._transport
        if transport is None or transport.is_closing():
            answer.connection_ended(None)
        elif len(body) <= _JOINED_BYTES_MAX:
            self._outbox.write(transport, head + body)
        else:
            self._outbox.write(transport, head)
            self._outbox.write(transport, body)

    def finished(self, *, reusable: bool) -> None:
        """The answer has ended; the connection is kept or closed."""
        self._answer = None
        transport = self._transport
        if transport is None:
            return
        # An answer that came before the request was out leaves a rest of it on the way.
        if (
            reusable
            and self.reusable
            and not transport.is_closing()
            and not transport.get_write_buffer_size()
        ):
            self._origin.keep(self)
        else:
            self.abort()

    def abort(self) -> None:
        """Closes the connection, whatever is on its way."""
        self.reusable = False
        if self._transport is not None:
            self._transport.abort()

    def pause(self) -> None:
        """Holds the engine back."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.pause_reading()

    def resume(self) -> None:
        """Reads on."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.resume_reading()

    def overdue(self) -> None:
        """An answer has not come in time, or no request has."""
        if self._answer is not None:
            self._answer.overdue()
        else:
            self.abort()

    # asyncio's protocol.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The connection stands."""
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        """Hands bytes to who waits for them."""
        if self._answer is not None:
            self._answer.received(data)
        else:
            # Nobody asked: whatever it is must not be taken for the next answer.
            self.abort()

    def eof_received(self) -> bool | None:
        """The engine sends no more: the transport closes."""
        return None

    def pause_writing(self) -> None:
        """The engine takes less than it is sent; what waits is one request, which is bounded."""

    def resume_writing(self) -> None:
        """The engine takes more again."""

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is gone."""
        self._transport = None
        self._origin.lost(self)
        if self._answer is not None:
            self._answer.connection_ended(exc)
