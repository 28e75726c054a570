"""Connections to engines: kept alive, and fresh ones for the case that a kept one has gone stale.

In come a URL and a body, out comes aiohttp's response together with whether its connection was reused.
Nothing is decompressed, redirected, or added to what the caller sends.
"""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import aiohttp
from aiohttp import hdrs
from multidict import CIMultiDict
from yarl import URL

# uvicorn, under vLLM, closes idle connections after 5 s. Ours go first, so that a request seldom meets a
# connection that is being closed.
KEEPALIVE_SECONDS = 4.0
# Engines are named by address; where one is named by host, its address is looked up this seldom.
DNS_CACHE_SECONDS = 300
# Buffer of one response before reading pauses: back-pressure reaches the engine at twice this.
READ_BUFFER_BYTES = 64 * 1024

_AUTOMATIC_HEADERS = (hdrs.ACCEPT, hdrs.ACCEPT_ENCODING, hdrs.USER_AGENT, hdrs.CONTENT_TYPE)


@dataclass(slots=True)
class Attempted:
    """What became of the connection of one attempt; filled in while it runs.

    Attributes:
        reused: True when the request went out on a kept connection.
    """

    reused: bool = False


class UpstreamPool:
    """Owns the client sessions of a worker."""

    def __init__(self, *, connect_timeout_seconds: float) -> None:
        """Opens the sessions; must be called on the event loop."""
        trace = aiohttp.TraceConfig()
        trace.on_connection_reuseconn.append(_mark_reused)
        # The other bounds of an attempt are the caller's: they differ before and after the first byte.
        self._timeout = aiohttp.ClientTimeout(total=None, connect=connect_timeout_seconds)
        self._kept = self._session(trace, force_close=False)
        self._fresh = self._session(trace, force_close=True)

    def _session(self, trace: aiohttp.TraceConfig, *, force_close: bool) -> aiohttp.ClientSession:
        kept: dict[str, Any] = {} if force_close else {"keepalive_timeout": KEEPALIVE_SECONDS}
        connector = aiohttp.TCPConnector(
            # Requests in flight are bounded at admission; a second bound here would queue unseen.
            limit=0,
            force_close=force_close,
            ttl_dns_cache=DNS_CACHE_SECONDS,
            **kept,
        )
        return aiohttp.ClientSession(
            connector=connector,
            timeout=self._timeout,
            auto_decompress=False,
            cookie_jar=aiohttp.DummyCookieJar(),
            skip_auto_headers=_AUTOMATIC_HEADERS,
            trust_env=False,
            trace_configs=[trace],
            read_bufsize=READ_BUFFER_BYTES,
        )

    async def post(
        self,
        url: str,
        *,
        body: bytes,
        headers: Mapping[str, str] | CIMultiDict[str],
        attempted: Attempted,
        fresh: bool,
    ) -> aiohttp.ClientResponse:
        """Sends a request and returns once the response headers have come.

        Args:
            url: Full URL of the engine's route.
            body: Sent as it is.
            headers: Sent as they are; `Host` and `Content-Length` are added.
            attempted: Filled in.
            fresh: Open a new connection for this request.

        Raises:
            aiohttp.ClientError: No response came.
            TimeoutError: The connection was not made in time.
        """
        session = self._fresh if fresh else self._kept
        return await session.post(
            URL(url, encoded=True),
            data=body,
            headers=headers,
            allow_redirects=False,
            trace_request_ctx=attempted,
        )

    async def close(self) -> None:
        """Closes all connections."""
        with suppress(aiohttp.ClientError):
            await self._kept.close()
            await self._fresh.close()


async def _mark_reused(_session: aiohttp.ClientSession, context: SimpleNamespace, _params: object) -> None:
    context.trace_request_ctx.reused = True
