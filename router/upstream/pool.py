"""Connections to engines: kept between requests, opened where none is at hand.

In come endpoint URLs, out come connections. Kept ones are closed before the engine closes them. Names are
looked up seldom, and within the time-out of connecting; connecting is bounded, the number of connections is
not: requests in flight are bounded at admission, and a second bound here would queue unseen.
"""

import asyncio
import ipaddress
import re
import socket
import ssl
from collections.abc import Collection, Sequence
from contextlib import suppress
from typing import cast
from urllib.parse import urlsplit

from core.clock import Clock
from router.upstream.connection import Connection
from router.upstream.failures import AttemptFailed, Cause, cause_of_connecting
from router.wire.deadlines import Deadlines
from router.wire.outbox import Outbox

# uvicorn, under vLLM, closes idle connections after 5 s. Ours go first, so that a request seldom meets a
# connection that is being closed.
KEEPALIVE_SECONDS = 4.0
# Engines are named by address; where one is named by host, its address is looked up this seldom.
DNS_CACHE_SECONDS = 300.0
# Far more engines than one router serves; beyond it what is known of all is worked out anew.
_ORIGINS_MAX = 10_000

_HOST = re.compile(r"[A-Za-z0-9._:%-]+")
_PATH = re.compile(r"[!-~]*")


class Origin:
    """Where an endpoint's URL leads, and the connections there.

    Attributes:
        host: Name or address.
        port: TCP port.
        secure: TLS.
        before_path: What stands between the method and the route in a request's first line.
        after_path: What follows the route: the rest of the line, and the Host header.
    """

    __slots__ = (
        "_deadlines", "_kept", "_opened", "after_path", "before_path", "host", "port", "secure",
    )  # fmt: skip

    def __init__(self, url: str, deadlines: Deadlines) -> None:
        """Takes the base URL of an endpoint.

        Raises:
            ValueError: It is none.
        """
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username is not None:
            raise ValueError(f"{url[:200]!r} is no http or https URL of a server")
        self.secure = parts.scheme == "https"
        self.host = parts.hostname
        self.port = parts.port or (443 if self.secure else 80)
        path = parts.path.rstrip("/")
        if not _HOST.fullmatch(self.host) or not _PATH.fullmatch(path) or parts.query:
            raise ValueError(f"{url[:200]!r} has characters that do not belong into a URL")
        host = f"[{self.host}]" if ":" in self.host else self.host
        authority = host if parts.port is None else f"{host}:{self.port}"
        self.before_path = f" {path}".encode()
        self.after_path = f" HTTP/1.1\r\nhost: {authority}\r\n".encode()
        self._deadlines = deadlines
        self._kept: list[Connection] = []
        self._opened: set[Connection] = set()

    def take(self) -> Connection | None:
        """Takes the kept connection that was used last; None without one."""
        while self._kept:
            connection = self._kept.pop()
            if connection.reusable and connection.deadline_seconds > connection.monotonic():
                return connection
            connection.abort()
        return None

    def keep(self, connection: Connection) -> None:
        """Keeps a connection for the next request, for a while."""
        connection.deadline_seconds = connection.monotonic() + KEEPALIVE_SECONDS
        self._kept.append(connection)

    def opened(self, connection: Connection) -> None:
        """Watches a new connection."""
        self._opened.add(connection)
        self._deadlines.watch(connection)

    def lost(self, connection: Connection) -> None:
        """Forgets a connection that is gone."""
        self._opened.discard(connection)
        self._deadlines.forget(connection)
        if connection in self._kept:
            self._kept.remove(connection)

    def close(self) -> None:
        """Closes all connections."""
        for connection in list(self._opened):
            connection.abort()
        self._kept.clear()


class UpstreamPool:
    """Owns the connections of a worker."""

    def __init__(
        self, *, connect_timeout_seconds: float, clock: Clock, deadlines: Deadlines, outbox: Outbox
    ) -> None:
        self._connect_timeout_seconds = connect_timeout_seconds
        self._clock = clock
        self._deadlines = deadlines
        self._outbox = outbox
        self._origins: dict[str, Origin] = {}
        self._addresses: dict[tuple[str, int], tuple[float, Sequence[str]]] = {}
        self._tls: ssl.SSLContext | None = None

    def origin(self, url: str) -> Origin:
        """Returns where a URL leads.

        Raises:
            AttemptFailed: It is no URL of a server.
        """
        found = self._origins.get(url)
        if found is None:
            try:
                found = Origin(url, self._deadlines)
            except ValueError as error:
                raise AttemptFailed(Cause.CONNECT_FAILED, str(error)) from error
            if len(self._origins) >= _ORIGINS_MAX:
                self.retain(())
            self._origins[url] = found
        return found

    def retain(self, urls: Collection[str]) -> None:
        """Forgets all other endpoints; their kept connections close by themselves when their time is over."""
        for url in [each for each in self._origins if each not in urls]:
            del self._origins[url]

    async def connect(self, origin: Origin) -> Connection:
        """Opens a connection.

        Raises:
            AttemptFailed: It does not stand in time.
        """
        try:
            async with asyncio.timeout(self._connect_timeout_seconds):
                connection = await self._connect(origin)
        except TimeoutError as error:
            raise AttemptFailed(
                Cause.CONNECT_TIMEOUT, f"no connection within {self._connect_timeout_seconds:g} s"
            ) from error
        except OSError as error:
            raise AttemptFailed(cause_of_connecting(error), str(error) or type(error).__name__) from error
        origin.opened(connection)
        return connection

    async def close(self) -> None:
        """Closes all connections."""
        for origin in self._origins.values():
            origin.close()
        self._origins.clear()
        # Transports close in the next turn of the event loop.
        await asyncio.sleep(0)
        self._deadlines.close()

    async def _connect(self, origin: Origin) -> Connection:
        loop = asyncio.get_running_loop()
        failure: OSError | None = None
        for address in await self._resolve(origin):
            try:
                connection = Connection(origin, self._outbox, self._clock.monotonic)
                await loop.create_connection(
                    lambda protocol=connection: cast("asyncio.Protocol", protocol),
                    address,
                    origin.port,
                    ssl=self._context() if origin.secure else None,
                    server_hostname=origin.host if origin.secure else None,
                )
            except TimeoutError:
                raise
            except OSError as error:
                failure = error
            else:
                return connection
        raise failure or OSError(f"{origin.host} has no address")

    async def _resolve(self, origin: Origin) -> Sequence[str]:
        """Returns the addresses of an origin, in the order of the system's resolver."""
        with suppress(ValueError):
            ipaddress.ip_address(origin.host.partition("%")[0])
            return (origin.host,)
        key = (origin.host, origin.port)
        now = self._clock.monotonic()
        until, addresses = self._addresses.get(key, (0.0, ()))
        if not addresses or until <= now:
            found = await asyncio.get_running_loop().getaddrinfo(*key, type=socket.SOCK_STREAM)
            addresses = tuple(dict.fromkeys(str(each[4][0]) for each in found))
            if len(self._addresses) >= _ORIGINS_MAX:
                self._addresses.clear()
            self._addresses[key] = (now + DNS_CACHE_SECONDS, addresses)
        return addresses

    def _context(self) -> ssl.SSLContext:
        # Made when it is first needed: it reads the system's certificates.
        if self._tls is None:
            self._tls = ssl.create_default_context()
        return self._tls
