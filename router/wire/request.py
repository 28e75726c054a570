"""One request of the hot path: its head, and its body as it comes.

In come the head and the bytes of the body, out comes the body once all of it is there. It is read once, by
whoever serves the request; how many bytes may come is the connection's business.
"""

import asyncio

from router.wire.headers import RequestHeaders
from router.wire.request_head import RequestHead
from router.wire.task import Signal


class WireRequest:
    """One request of the hot path.

    Attributes:
        head: Its head.
        missing_bytes: Of its body, that have not come.
    """

    __slots__ = ("_arrived", "_pieces", "_unwanted", "head", "missing_bytes")

    def __init__(self, head: RequestHead) -> None:
        self.head = head
        self.missing_bytes = head.length
        self._pieces: list[bytes] = []
        self._arrived: Signal | None = None
        self._unwanted = False

    @property
    def path(self) -> str:
        """The route with its query."""
        return self.head.path

    @property
    def headers(self) -> RequestHeaders:
        """All headers."""
        return self.head.headers

    def feed(self, data: bytes) -> None:
        """Takes the next bytes of the body, none beyond it."""
        self.missing_bytes -= len(data)
        if not self._unwanted:
            self._pieces.append(data)
        if not self.missing_bytes and self._arrived is not None:
            self._arrived.set()

    async def read(self, *, bytes_max: int, timeout_seconds: float) -> bytes | None:
        """Returns the body once it has come completely; None where it is longer than `bytes_max`.

        Raises:
            TimeoutError: It has not come in time.
        """
        if self.head.length > bytes_max:
            return None
        if self.missing_bytes:
            self._arrived = Signal()
            async with asyncio.timeout(timeout_seconds):
                await self._arrived
        return self.body()

    def body(self) -> bytes:
        """Returns the body, of which nothing is missing."""
        pieces = self._pieces
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def discard(self) -> None:
        """Keeps nothing more of the body."""
        self._unwanted = True
        self._pieces.clear()
