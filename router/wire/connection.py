"""One client connection while it carries requests of the hot path.

    bytes ─► head complete and plainly hot? ─ yes ─► serve it, keep the connection, look at the next head
                                            └ no ──► aiohttp gets every byte from here on, for good

In come the bytes of a transport, whose protocol this is until a request comes that is not hot; out go calls
of `serve` with a `WireRequest` and a `WireDownstream`. Requests of a connection are served one after the
other; what comes early waits in one bounded buffer, unread. It parses nothing that is not hot, and closes
nothing by itself but a connection whose answer is not whole: that is aiohttp's handler's business.
"""

import asyncio
from collections.abc import Callable, Mapping
from typing import Protocol

from router.wire.downstream import WireDownstream
from router.wire.outbox import Outbox
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


class Handler(Protocol):
    """Whoever owns the connection: aiohttp's handler, which takes over where it has to."""

    @property
    def closing(self) -> bool:
        """No further request of this connection is served."""
        ...

    def served(self) -> None:
        """A request has been answered: the connection may stay idle for a while from now on."""
        ...

    def close_soon(self) -> None:
        """The connection ends with the answer that was given last."""
        ...

    def force_close(self) -> None:
        """Closes the connection."""
        ...

    def take_over(self, data: bytes) -> None:
        """Takes these bytes and all that follow."""
        ...

    def eof_received(self) -> bool | None:
        """The client sends no more."""
        ...

    def pause_writing(self) -> None:
        """The transport holds more than is good."""
        ...

    def resume_writing(self) -> None:
        """The transport holds little again."""
        ...

    def connection_lost(self, exc: BaseException | None) -> None:
        """The connection is gone."""
        ...


class WireConnection:
    """Serves the hot requests of one connection; an asyncio protocol, made when the connection stands."""

    def __init__(
        self,
        handler: Handler,
        transport: asyncio.Transport,
        loop: asyncio.AbstractEventLoop,
        routes: Mapping[bytes, str],
        serve: Serve,
        outbox: Outbox,
    ) -> None:
        """Takes its handler and transport, the routes of the hot path by path, what serves and writes."""
        self._handler = handler
        self._transport: asyncio.Transport | None = transport
        self._loop = loop
        self._reader = HeadReader(routes)
        self._serve = serve
        self._outbox = outbox
        self._early = b""
        self._blocked = False
        self._request: WireRequest | None = None
        self._downstream: WireDownstream | None = None
        self._serving: Serving | None = None
        self._over: Signal | None = None
        self._linger: asyncio.TimerHandle | None = None

    @property
    def busy(self) -> bool:
        """A request has begun, and its connection is not ready for the next one."""
        return self._request is not None

    async def wait_served(self, timeout_seconds: float | None) -> None:
        """Waits until the request that is being served has ended; ends it when the time is over."""
        serving = self._serving
        if serving is None:
            return
        self._over = Signal()
        try:
            async with asyncio.timeout(timeout_seconds):
                await self._over
        except TimeoutError:
            if not serving.done:
                serving.cancel()

    # asyncio's protocol.

    def data_received(self, data: bytes) -> None:
        """Takes the next bytes of the client."""
        request = self._request
        if request is None:
            self._begin(self._early + data if self._early else data)
            return
        self._feed(request, data)
        if not request.missing_bytes and self._serving is None and self._request is request:
            self._request = None
            self._next()

    def eof_received(self) -> bool | None:
        """The client sends no more."""
        return self._handler.eof_received()

    def pause_writing(self) -> None:
        """The transport holds more than is good."""
        self._blocked = True
        self._handler.pause_writing()
        if self._downstream is not None:
            self._downstream.block()

    def resume_writing(self) -> None:
        """The transport holds little again."""
        self._blocked = False
        self._handler.resume_writing()
        if self._downstream is not None:
            self._downstream.unblock()

    def connection_lost(self, exc: BaseException | None) -> None:
        """The client has left: its request ends."""
        self._transport = None
        if self._linger is not None:
            self._linger.cancel()
        self._handler.connection_lost(exc)
        if self._downstream is not None:
            self._downstream.lose()
        if self._serving is not None:
            self._serving.cancel()

    def _begin(self, data: bytes) -> None:
        """Looks at the beginning of a request."""
        transport = self._transport
        if transport is None or self._handler.closing:
            return
        end = data.find(b"\r\n\r\n") + 4
        if end < 4:
            if may_become_hot(data):
                self._early = data
            else:
                self._hand_over(data)
            return
        head = self._reader.read(data[:end])
        if head is None:
            self._hand_over(data)
            return
        request = self._request = WireRequest(head)
        self._early = b""
        self._feed(request, data[end:])
        downstream = self._downstream = WireDownstream(transport, self._outbox, blocked=self._blocked)
        serving = self._serve(request, downstream, self._served)
        if not serving.done:
            self._serving = serving

    def _feed(self, request: WireRequest, data: bytes) -> None:
        """Gives a request the bytes of its body; keeps what comes after it."""
        missing = request.missing_bytes
        if len(data) > missing:
            # The next request comes before the answer of this one: it waits, and so does what follows it.
            self._early += data[missing:]
            if self._transport is not None:
                self._transport.pause_reading()
            data = data[:missing]
        if data:
            request.feed(data)

    def _hand_over(self, data: bytes) -> None:
        """Gives this and all that follows to aiohttp."""
        self._early = b""
        self._handler.take_over(data)

    def _served(self) -> None:
        """A request has ended."""
        self._serving = None
        downstream, request, transport = self._downstream, self._request, self._transport
        self._downstream = None
        if self._over is not None:
            self._over.set()
        if downstream is None or request is None or transport is None:
            return
        if not downstream.ended:
            # Nothing may look complete.
            self._outbox.flush()
            transport.abort()
            return
        self._handler.served()
        if downstream.closes:
            self._handler.close_soon()
        if request.missing_bytes:
            # Closing now would reset the connection before the client has read its answer.
            request.discard()
            self._linger = self._loop.call_later(LINGER_SECONDS, self._handler.force_close)
            return
        self._request = None
        if self._early or self._handler.closing:
            self._loop.call_soon(self._next)

    def _next(self) -> None:
        """Goes on with what came early, if the connection goes on."""
        if self._linger is not None:
            self._linger.cancel()
            self._linger = None
        if self._handler.closing:
            self._handler.force_close()
            return
        transport = self._transport
        if transport is None or transport.is_closing() or self._request is not None:
            return
        data, self._early = self._early, b""
        transport.resume_reading()
        if data:
            self._begin(data)
