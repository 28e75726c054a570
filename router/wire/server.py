"""The server's side of client connections: hot requests are served here, all others by aiohttp.

    bytes ─► head complete and plainly hot? ─ yes ─► serve it, keep the connection, look at the next head
                                            └ no ──► aiohttp gets every byte from here on, for good

In come the bytes of a connection, out go calls of `serve` with a `WireRequest` and a `WireDownstream`; what
it returns is `Serving`, to be cancelled when the client leaves. The
connection is aiohttp's own class with one method in front, so that whatever is not hot is parsed, limited and
answered by aiohttp exactly as without this module. Requests of a connection are served one after the other;
what comes early waits in one bounded buffer, unread.
"""

import asyncio
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from aiohttp import web
from aiohttp.web_protocol import RequestHandler

from router.wire.downstream import WireDownstream
from router.wire.request import WireRequest
from router.wire.request_head import HeadReader, may_become_hot
from router.wire.task import Signal

# As aiohttp: how long the rest of a body is read that nobody wants, so that its client reads the answer.
LINGER_SECONDS = 10.0


class Serving(Protocol):
    """One request that is being served.

    Attributes:
        done: It has ended.
    """

    @property
    def done(self) -> bool:
        """It has ended."""
        ...

    def cancel(self) -> object:
        """Ends it, because its client has left or the time is over; may do so later."""
        ...


# Serves a request, answers its errors, and calls what it is given at the end, perhaps before it returns.
Serve = Callable[[WireRequest, WireDownstream, Callable[[], None]], Serving]


class WireProtocol(RequestHandler):
    """One client connection."""

    __slots__ = (
        "_downstream", "_early", "_linger", "_ordinary", "_over", "_reader", "_request", "_serve", "_serving",
    )  # fmt: skip

    def __init__(
        self, server: web.Server, *, routes: Mapping[bytes, str], serve: Serve, **options: Any
    ) -> None:
        super().__init__(server, **options)
        self._reader = HeadReader(routes)
        self._serve = serve
        self._ordinary = False
        self._early = b""
        self._request: WireRequest | None = None
        self._downstream: WireDownstream | None = None
        self._serving: Serving | None = None
        self._over: Signal | None = None
        self._linger: asyncio.TimerHandle | None = None

    def data_received(self, data: bytes) -> None:
        """Takes the next bytes of the client."""
        if self._ordinary:
            super().data_received(data)
            return
        request = self._request
        if request is None:
            self._begin(self._early + data if self._early else data)
            return
        self._feed(request, data)
        if not request.missing_bytes and self._serving is None and self._request is request:
            self._request = None
            self._next()

    def _begin(self, data: bytes) -> None:
        """Looks at the beginning of a request."""
        if self._force_close or self._close:
            return
        end = data.find(b"\r\n\r\n") + 4
        if end < 4:
            if may_become_hot(data):
                self._early = data
            else:
                self._hand_over(data)
            return
        head = self._reader.read(data[:end])
        transport = self.transport
        if head is None or transport is None:
            self._hand_over(data)
            return
        request = self._request = WireRequest(head)
        self._early = b""
        self._feed(request, data[end:])
        downstream = self._downstream = WireDownstream(transport, blocked=self._paused)
        serving = self._serve(request, downstream, self._served)
        if not serving.done:
            self._serving = serving

    def _feed(self, request: WireRequest, data: bytes) -> None:
        """Gives a request the bytes of its body; keeps what comes after it."""
        missing = request.missing_bytes
        if len(data) > missing:
            # The next request comes before the answer of this one: it waits, and so does what follows it.
            self._early += data[missing:]
            self._pause_transport_reading()
            data = data[:missing]
        if data:
            request.feed(data)

    def _hand_over(self, data: bytes) -> None:
        """Gives this and all that follows to aiohttp."""
        self._ordinary = True
        self._early = b""
        super().data_received(data)

    def _served(self) -> None:
        """A request has ended."""
        self._serving = None
        downstream, request = self._downstream, self._request
        self._downstream = None
        if self._over is not None:
            self._over.set()
        if downstream is None or request is None or self.transport is None:
            return
        if not downstream.ended:
            # Nothing may look complete.
            self.transport.abort()
            return
        self._next_keepalive_close_time = self._loop.time() + self._keepalive_timeout
        if downstream.closes:
            self._close = True
        if request.missing_bytes:
            # Closing now would reset the connection before the client has read its answer.
            request.discard()
            self._linger = self._loop.call_later(LINGER_SECONDS, self.force_close)
            return
        self._request = None
        if self._early or self._close:
            self._loop.call_soon(self._next)

    def _next(self) -> None:
        """Goes on with what came early, if the connection goes on."""
        if self._linger is not None:
            self._linger.cancel()
            self._linger = None
        if self._close:
            self.force_close()
        if self.transport is None or self._request is not None or self._ordinary:
            return
        data, self._early = self._early, b""
        self._resume_transport_reading()
        if data:
            self._begin(data)

    # What aiohttp's server and the transport call.

    def close(self) -> None:
        """Serves what is being served, then closes."""
        if self._request is None:
            super().close()
        else:
            self._close = True

    async def shutdown(self, timeout: float | None = 15.0) -> None:  # noqa: ASYNC109 - aiohttp's signature
        """Waits for the request that is being served, then closes."""
        if self._serving is not None:
            self._close = True
            self._over = Signal()
            try:
                async with asyncio.timeout(timeout):
                    await self._over
            except TimeoutError:
                if self._serving is not None:
                    self._serving.cancel()
        await super().shutdown(timeout)

    def connection_lost(self, exc: BaseException | None) -> None:
        """The client has left: its request ends."""
        if self._linger is not None:
            self._linger.cancel()
        super().connection_lost(exc)
        if self._downstream is not None:
            self._downstream.lose()
        if self._serving is not None:
            self._serving.cancel()

    def pause_writing(self) -> None:
        """The transport holds more than is good."""
        super().pause_writing()
        if self._downstream is not None:
            self._downstream.block()

    def resume_writing(self) -> None:
        """The transport holds little again."""
        super().resume_writing()
        if self._downstream is not None:
            self._downstream.unblock()

    def _process_keepalive(self) -> None:
        if self._request is not None:
            self._next_keepalive_close_time = self._loop.time() + self._keepalive_timeout
        super()._process_keepalive()


class WireServer(web.Server):
    """aiohttp's server with connections that know the hot path."""

    def __init__(self, server: web.Server, *, routes: Mapping[bytes, str], serve: Serve) -> None:
        """Takes the server of an application, and what is served beside it.

        Args:
            server: As aiohttp makes it; gives handler, request factory and options.
            routes: Of the hot path, by path.
            serve: Serves one request.
        """
        super().__init__(
            server.request_handler,
            request_factory=server.request_factory,
            handler_cancellation=server.handler_cancellation,
            loop=server._loop,  # noqa: SLF001 - the same server, made anew with another protocol
            **server._kwargs,  # noqa: SLF001 - as above
        )
        self._routes = routes
        self._serve = serve

    def __call__(self) -> RequestHandler:
        """Makes the protocol of a new connection."""
        return WireProtocol(self, loop=self._loop, routes=self._routes, serve=self._serve, **self._kwargs)


class WireRunner(web.AppRunner):
    """aiohttp's runner of an application, with the hot path in front."""

    def __init__(
        self, application: web.Application, *, routes: Mapping[bytes, str], serve: Serve, **options: Any
    ) -> None:
        super().__init__(application, **options)
        self._routes = routes
        self._serve = serve

    async def _make_server(self) -> web.Server:
        return WireServer(await super()._make_server(), routes=self._routes, serve=self._serve)
