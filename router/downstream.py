"""The client's side of one request, whatever carries it: what is read from it, and what is written to it.

    start   status and headers, once; a second answer that continues the first does not start again
    write   bytes of the body, in order; never waits
    end     the body is complete; the connection may serve the next request
    abort   the connection ends before the body does, so that nothing looks complete
    drain   waits while the client takes less than it is sent; `blocked` and `listener` say the same without
            waiting

In come these calls, out go bytes of HTTP. An implementation frames them (length or chunks) and keeps what
the client has not taken yet; it bounds that by `drain`, not by losing anything. A client that has left is
told by cancelling whoever serves it; what is written to it afterwards is dropped.
"""

from collections.abc import Mapping
from typing import Protocol

from router.wire.headers import RequestHeaders


class Incoming(Protocol):
    """A request as it comes in."""

    @property
    def path(self) -> str:
        """The route with its query."""
        ...

    @property
    def headers(self) -> RequestHeaders:
        """All headers."""
        ...

    async def read(self, *, bytes_max: int, timeout_seconds: float) -> bytes | None:
        """Returns the body once it has come completely; None where it is longer than `bytes_max`.

        Raises:
            TimeoutError: It has not come in time.
        """
        ...


class DownstreamListener(Protocol):
    """Who writes to a client, to be told what becomes of it."""

    def drained(self) -> None:
        """The client's side is not blocked any more."""
        ...

    def lost(self) -> None:
        """The client has left."""
        ...


class Downstream(Protocol):
    """One request's way back to its client.

    Attributes:
        listener: Who is told of changes; None for nobody.
    """

    listener: DownstreamListener | None

    @property
    def blocked(self) -> bool:
        """More waits for the client than is good: write again after `listener.drained` or `drain`."""
        ...

    @property
    def started(self) -> bool:
        """Status and headers have been given."""
        ...

    @property
    def length(self) -> int | None:
        """Bytes of the body as promised in the headers; None for a stream."""
        ...

    @property
    def content_type(self) -> str:
        """As promised in the headers; empty for none."""
        ...

    @property
    def tail(self) -> bytes:
        """The piece that was written last; empty before the first."""
        ...

    def start(self, status: int, headers: Mapping[str, str], *, length: int | None) -> None:
        """Gives status and headers, once.

        Args:
            status: HTTP status.
            headers: Without those that frame the body.
            length: Bytes of the body; None where they are not known.
        """
        ...

    def write(self, piece: bytes, framed: bytes = b"") -> None:
        """Gives the next bytes of the body; an empty piece is nothing.

        Args:
            piece: The bytes.
            framed: The same bytes as one whole chunk, where the engine sent them so: goes out as it is if
                the client gets chunks.
        """
        ...

    def end(self, *, close: bool = False) -> None:
        """Completes the body; `close` ends the connection after it."""
        ...

    def abort(self) -> None:
        """Ends the connection at once."""
        ...

    async def drain(self) -> None:
        """Waits until what was written is with the client, or at least in bounded buffers.

        Raises:
            ConnectionError: The client has left.
        """
        ...
