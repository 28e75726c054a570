"""A request and its answer through aiohttp's server: for requests that take the ordinary way.

In come the calls of `Downstream`, which do not wait; out go aiohttp's, which do. They meet in `pump`, which
runs in the handler of the request while a task of its own serves it.
"""

import asyncio
from collections import deque
from collections.abc import Coroutine, Mapping
from typing import Any

from aiohttp import hdrs, web

from core.tasks import cancel_and_wait
from router.downstream import DownstreamListener
from router.wire.headers import RequestHeaders

# As much as aiohttp itself keeps for a client before its own writes wait.
_UNSENT_BYTES_MAX = 64 * 1024


class AiohttpRequest:
    """Implements `router.downstream.Incoming`."""

    def __init__(self, request: web.Request) -> None:
        self.path = request.path_qs
        self.headers = RequestHeaders(request.raw_headers)
        self._request = request

    async def read(self, *, bytes_max: int, timeout_seconds: float) -> bytes | None:
        """Returns the body once it has come completely; None where it is longer than `bytes_max`.

        Raises:
            TimeoutError: It has not come in time.
        """
        if (self._request.content_length or 0) > bytes_max:
            return None
        pieces: list[bytes] = []
        size = 0
        async with asyncio.timeout(timeout_seconds):
            while piece := await self._request.content.readany():
                size += len(piece)
                if size > bytes_max:
                    return None
                pieces.append(piece)
        return b"".join(pieces)


class AiohttpDownstream:
    """Implements `router.downstream.Downstream`."""

    def __init__(self, request: web.Request) -> None:
        self.listener: DownstreamListener | None = None
        self.started = False
        self.length: int | None = None
        self.content_type = ""
        self.tail = b""
        self._request = request
        self._response: web.StreamResponse | None = None
        self._pieces: deque[bytes] = deque()
        self._unsent_bytes = 0
        self._ended = False
        self._lost = False
        self._written = asyncio.Event()
        self._drained = asyncio.Event()

    def start(self, status: int, headers: Mapping[str, str], *, length: int | None) -> None:
        """Gives status and headers, once."""
        self._response = web.StreamResponse(status=status, headers=headers)
        self._response.content_length = length
        self.content_type = headers.get(hdrs.CONTENT_TYPE, "")
        self.length = length
        self.started = True
        self._written.set()

    @property
    def blocked(self) -> bool:
        """More waits for the client than is good."""
        return self._unsent_bytes > _UNSENT_BYTES_MAX

    def write(self, piece: bytes, framed: bytes = b"") -> None:
        """Gives the next bytes of the body; aiohttp frames them anew."""
        del framed
        if piece and not self._lost:
            self._pieces.append(piece)
            self._unsent_bytes += len(piece)
            self.tail = piece
            self._written.set()

    def end(self, *, close: bool = False) -> None:
        """Completes the body."""
        if close and self._response is not None:
            self._response.force_close()
        self._ended = True
        self._written.set()

    def abort(self) -> None:
        """Ends the connection at once."""
        self._ended = self._lost = True
        self._pieces.clear()
        if self._request.transport is not None:
            self._request.transport.abort()
        self._written.set()

    async def drain(self) -> None:
        """Waits until aiohttp has taken enough."""
        while self.blocked and not self._lost:
            self._drained.clear()
            await self._drained.wait()
        if self._lost:
            raise ConnectionResetError("the client has left")

    async def run(self, serving: Coroutine[Any, Any, None]) -> web.StreamResponse:
        """Runs what serves the request, and hands to aiohttp what it writes, until both are done.

        Raises:
            Refusal: Raised by `serving` before it has started an answer.
            ConnectionError: The client left before an answer was started.
        """
        task = asyncio.create_task(serving, name="serve-request")
        task.add_done_callback(lambda _: self._written.set())
        try:
            await self._pump(task)
        except ConnectionError:
            # `serving` learns it from its next `drain`, and aiohttp from an answer that it cannot send.
            self._lose()
        except BaseException:
            await cancel_and_wait(task)
            raise
        await task
        if self._response is None:
            raise ConnectionResetError("the client has left")
        return self._response

    async def _pump(self, task: "asyncio.Task[None]") -> None:
        prepared = False
        while not self._ended and not task.done():
            await self._written.wait()
            self._written.clear()
            response = self._response
            if response is None:
                continue
            if not prepared:
                prepared = True
                await response.prepare(self._request)
            while self._pieces:
                piece = self._pieces.popleft()
                await response.write(piece)
                self._take(len(piece))
        if self._response is not None and not self._lost:
            if self._ended:
                await self._response.write_eof()
            else:
                # What served the request failed after it had started: nothing may look complete.
                self.abort()
        self._drained.set()

    def _take(self, count: int) -> None:
        was_blocked = self.blocked
        self._unsent_bytes -= count
        self._drained.set()
        if was_blocked and not self.blocked and self.listener is not None:
            self.listener.drained()

    def _lose(self) -> None:
        self._lost = True
        self._pieces.clear()
        self._drained.set()
        if self.listener is not None:
            self.listener.lost()
