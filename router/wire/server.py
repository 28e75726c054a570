"""The server's side of client connections: hot requests are served here, all others by aiohttp.

In come connections, out goes aiohttp's own handler for each, with a `WireConnection` in front: the transport
talks to that until a request comes that is not hot, and to the handler from then on. So whatever is not hot
is parsed, limited and answered by aiohttp exactly as without this module. It serves nothing itself.
"""

import asyncio
from collections.abc import Mapping
from typing import Any, cast

from aiohttp import web
from aiohttp.web_protocol import RequestHandler

from router.wire.connection import Serve, WireConnection
from router.wire.outbox import Outbox


class WireProtocol(RequestHandler):
    """One client connection. Implements `router.wire.connection.Handler`."""

    __slots__ = ("_hot", "_outbox", "_routes", "_serve")

    def __init__(
        self, server: web.Server, *, routes: Mapping[bytes, str], serve: Serve, outbox: Outbox, **options: Any
    ) -> None:
        super().__init__(server, **options)
        self._routes = routes
        self._serve = serve
        self._outbox = outbox
        # None before the connection stands, and after a request that was not hot.
        self._hot: WireConnection | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The connection stands: hot until it shows otherwise."""
        super().connection_made(transport)
        connection = cast("asyncio.Transport", transport)
        self._hot = WireConnection(self, connection, self._loop, self._routes, self._serve, self._outbox)
        # It has all methods of a protocol, and is none of asyncio's classes so that it can be compiled.
        connection.set_protocol(cast("asyncio.Protocol", self._hot))

    def connection_lost(self, exc: BaseException | None) -> None:
        """The connection is gone."""
        super().connection_lost(exc)
        self._hot = None

    # What the hot connection asks.

    @property
    def closing(self) -> bool:
        """No further request of this connection is served."""
        return self._close or self._force_close

    def served(self) -> None:
        """A request has been answered: the connection may stay idle for a while from now on."""
        self._next_keepalive_close_time = self._loop.time() + self._keepalive_timeout

    def close_soon(self) -> None:
        """The connection ends with the answer that was given last."""
        self._close = True

    def take_over(self, data: bytes) -> None:
        """Takes these bytes and all that follow."""
        self._hot = None
        if self.transport is not None:
            self.transport.set_protocol(self)
        self.data_received(data)

    # What aiohttp's server calls.

    def close(self) -> None:
        """Serves what is being served, then closes."""
        if self._hot is None or not self._hot.busy:
            super().close()
        else:
            self._close = True

    async def shutdown(self, timeout: float | None = 15.0) -> None:  # noqa: ASYNC109 - aiohttp's signature
        """Waits for the request that is being served, then closes."""
        if self._hot is not None:
            self._close = True
            await self._hot.wait_served(timeout)
        await super().shutdown(timeout)

    def _process_keepalive(self) -> None:
        if self._hot is not None and self._hot.busy:
            self.served()
        super()._process_keepalive()


class WireServer(web.Server):
    """aiohttp's server with connections that know the hot path."""

    def __init__(
        self, server: web.Server, *, routes: Mapping[bytes, str], serve: Serve, outbox: Outbox
    ) -> None:
        """Takes the server of an application, and what is served beside it.

        Args:
            server: As aiohttp makes it; gives handler, request factory and options.
            routes: Of the hot path, by path.
            serve: Serves one request.
            outbox: Writes its answer.
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
        self._outbox = outbox

    def __call__(self) -> RequestHandler:
        """Makes the protocol of a new connection."""
        return WireProtocol(
            self, loop=self._loop, routes=self._routes, serve=self._serve, outbox=self._outbox, **self._kwargs
        )


class WireRunner(web.AppRunner):
    """aiohttp's runner of an application, with the hot path in front."""

    def __init__(
        self,
        application: web.Application,
        *,
        routes: Mapping[bytes, str],
        serve: Serve,
        outbox: Outbox,
        **options: Any,
    ) -> None:
        super().__init__(application, **options)
        self._routes = routes
        self._serve = serve
        self._outbox = outbox

    async def _make_server(self) -> web.Server:
        return WireServer(
            await super()._make_server(), routes=self._routes, serve=self._serve, outbox=self._outbox
        )
