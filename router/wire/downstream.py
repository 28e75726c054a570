"""The client's side of a request of the hot path: writes HTTP/1.1 to the client's socket.

In come the calls of `router.downstream.Downstream`, out go bytes: head and first piece in one buffer, bodies
of unknown length in chunks, and a chunk that an engine sent whole as it came. What the client does not take
waits in the transport; `blocked` says that this is enough.
"""

import asyncio
import time
from collections.abc import Mapping
from email.utils import formatdate
from http import HTTPStatus

from router.downstream import DownstreamListener
from router.wire.outbox import Outbox
from router.wire.task import Signal

_STATUS_LINES = {each.value: f"HTTP/1.1 {each.value} {each.phrase}\r\n" for each in HTTPStatus}
_WITHOUT_BODY = (204, 304)


class _Date:
    """The value of the `Date` header, worked out once a second."""

    def __init__(self) -> None:
        self._second = 0
        self._text = ""

    def text(self) -> str:
        """Returns the present value."""
        second = int(time.time())
        if second != self._second:
            self._second, self._text = second, formatdate(second, usegmt=True)
        return self._text


_date = _Date()


class WireDownstream:
    """Implements `router.downstream.Downstream` on a transport.

    Attributes:
        ended: The body is complete.
        closes: The connection ends with this answer.
    """

    __slots__ = (
        "_chunked", "_head", "_outbox", "_request_id", "_transport", "_unblocked", "blocked", "closes",
        "content_type", "ended", "length", "listener", "started", "tail",
    )  # fmt: skip

    def __init__(self, transport: asyncio.WriteTransport, outbox: Outbox, *, blocked: bool) -> None:
        """Takes the client's transport, what writes to it, and whether it already holds more than is good."""
        self.listener: DownstreamListener | None = None
        self.started = False
        self.ended = False
        self.closes = False
        self.blocked = blocked
        self.length: int | None = None
        self.content_type = ""
        self.tail = b""
        self._transport: asyncio.WriteTransport | None = transport
        self._outbox = outbox
        self._head = b""
        self._chunked = False
        self._unblocked: Signal | None = None
        self._request_id = ""

    def identify(self, request_id: str) -> None:
        """Takes the request id that the head shows."""
        self._request_id = request_id

    def start(self, status: int, headers: Mapping[str, str], *, length: int | None) -> None:
        """Gives status and headers, once."""
        self.started = True
        self.length = length
        lines = [_STATUS_LINES.get(status) or f"HTTP/1.1 {status} \r\n"]
        for name, value in headers.items():
            if "\n" in value or "\r" in value:
                raise ValueError(f"header {name} has a line end in its value")
            lines.append(f"{name}: {value}\r\n")
        self.content_type = headers.get("Content-Type", "")
        if status in _WITHOUT_BODY:
            self.length = 0
            framing = ""
        elif length is None:
            self._chunked = True
            framing = "Transfer-Encoding: chunked\r\n"
        else:
            framing = f"Content-Length: {length}\r\n"
        closing = "Connection: close\r\n" if self.closes else ""
        lines.append(f"x-request-id: {self._request_id}\r\n{framing}{closing}Date: {_date.text()}\r\n\r\n")
        self._head = "".join(lines).encode("utf-8", "surrogateescape")

    def write(self, piece: bytes, framed: bytes = b"") -> None:
        """Gives the next bytes of the body."""
        transport = self._transport
        if transport is None or not piece:
            return
        self.tail = piece
        if self._chunked:
            piece = framed or b"%x\r\n%b\r\n" % (len(piece), piece)
        if self._head:
            piece = self._head + piece
            self._head = b""
        self._outbox.write(transport, piece)

    def end(self, *, close: bool = False) -> None:
        """Completes the body."""
        self.ended = True
        self.closes = self.closes or close
        transport = self._transport
        if transport is None:
            return
        rest = self._head + b"0\r\n\r\n" if self._chunked else self._head
        self._head = b""
        if rest:
            self._outbox.write(transport, rest)

    def abort(self) -> None:
        """Ends the connection at once."""
        self.closes = True
        if self._transport is not None:
            # What was written before is the client's.
            self._outbox.flush()
            self._transport.abort()
            self._transport = None

    async def drain(self) -> None:
        """Waits until the transport holds little.

        Raises:
            ConnectionError: The client has left.
        """
        while self.blocked and self._transport is not None:
            self._unblocked = Signal()
            await self._unblocked
        if self._transport is None:
            raise ConnectionResetError("the client has left")

    # What the connection says.

    def block(self) -> None:
        """The transport holds more than is good."""
        self.blocked = True

    def unblock(self) -> None:
        """The transport holds little again."""
        self.blocked = False
        if self.listener is not None:
            self.listener.drained()
        if self._unblocked is not None:
            self._unblocked.set()

    def lose(self) -> None:
        """The client has left: what is still written is dropped."""
        self._transport = None
        if self._unblocked is not None:
            self._unblocked.set()
