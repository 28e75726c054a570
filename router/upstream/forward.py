"""One attempt at one engine, up to its first byte, and the rest of its answer after that.

In come an endpoint, headers and a body; out comes an `Answer` whose first bytes have arrived, or an
`AttemptFailed`. An attempt ends in exactly one of three ways: read to the end, broken, or aborted, and
in the last two its connection is closed, which makes the engine drop the request. It decides nothing
about retries.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

import aiohttp
from aiohttp import hdrs
from multidict import CIMultiDict

from core.clock import Clock
from router.upstream.failures import (
    AnswerBroken,
    AttemptFailed,
    Cause,
    ErrorAnswer,
    cause_of_answer,
    cause_of_exception,
)
from router.upstream.pool import Attempted, UpstreamPool
from router.view.view import Endpoint

# A kept connection that the engine had closed fails within a round trip; what fails later was at work.
STALE_SECONDS = 0.5
# Error bodies are read this far before anything is decided; vLLM's have a few hundred bytes.
ERROR_BODY_BYTES_MAX = 64 * 1024


@dataclass(frozen=True, slots=True)
class Timeouts:
    """Bounds of an attempt, in seconds.

    Attributes:
        connect_seconds: Until the connection stands.
        first_byte_seconds: Until the first byte of the body, for streams.
        whole_answer_seconds: The same for answers that come in one piece when the engine is done.
        idle_seconds: Between two pieces of the body.
    """

    connect_seconds: float
    first_byte_seconds: float
    whole_answer_seconds: float
    idle_seconds: float

    def until_first_byte(self, *, stream: bool) -> float:
        """Returns the bound until the first byte."""
        return self.first_byte_seconds if stream else self.whole_answer_seconds


class Answer:
    """An engine's answer whose first bytes have come.

    Attributes:
        status: HTTP status.
        headers: As the engine sent them.
        head: First bytes of the body; empty for an empty body.
        failure: How its body broke off, once it has; for people.
    """

    def __init__(self, response: aiohttp.ClientResponse, head: bytes, idle_seconds: float) -> None:
        self.status = response.status
        self.headers = response.headers
        self.head = head
        self.failure = ""
        self._response = response
        self._idle_seconds = idle_seconds

    async def next_piece(self) -> bytes:
        """Returns what has come since, as it came; empty at the end.

        Raises:
            AnswerBroken: The connection broke before the end.
            TimeoutError: Nothing came for the idle time-out.
        """
        content = self._response.content
        try:
            async with asyncio.timeout(self._idle_seconds):
                return await content.readany()
        except (aiohttp.ClientError, ConnectionError) as error:
            raise AnswerBroken(str(error) or type(error).__name__) from error


class Forwarder:
    """Makes attempts."""

    def __init__(
        self, pool: UpstreamPool, timeouts: Timeouts, clock: Clock, *, on_stale: Callable[[], None]
    ) -> None:
        """Takes what to call when a request is sent again because its connection had gone stale."""
        self._pool = pool
        self._timeouts = timeouts
        self._clock = clock
        self._on_stale = on_stale

    @asynccontextmanager
    async def attempt(
        self, endpoint: Endpoint, path: str, *, body: bytes, headers: CIMultiDict[str], stream: bool
    ) -> AsyncIterator[Answer]:
        """Sends a request and yields the answer once its first byte is there.

        Args:
            endpoint: Where to.
            path: Route, with its query.
            body: Sent byte for byte.
            headers: Sent as they are.
            stream: True when the client asked for a stream.

        Raises:
            AttemptFailed: There will be no first byte, or the engine says that it does not serve.
        """
        limit = self._timeouts.until_first_byte(stream=stream)
        response: aiohttp.ClientResponse | None = None
        try:
            try:
                async with asyncio.timeout(limit):
                    response = await self._send(endpoint.url + path, body, headers)
                    head = await _read_head(response)
            except aiohttp.ConnectionTimeoutError as error:
                raise AttemptFailed(
                    Cause.CONNECT_TIMEOUT, f"no connection within {self._timeouts.connect_seconds:g} s"
                ) from error
            except TimeoutError as error:
                raise AttemptFailed(Cause.FIRST_BYTE_TIMEOUT, f"silent for {limit:g} s") from error
            except (aiohttp.ClientError, OSError, ValueError) as error:
                raise AttemptFailed(cause_of_exception(error), str(error) or type(error).__name__) from error
            cause = cause_of_answer(response.status, head)
            if cause is not None:
                raise AttemptFailed(
                    cause, f"the engine answered {response.status}", answer=_error_answer(response, head)
                )
            yield Answer(response, head, self._timeouts.idle_seconds)
        finally:
            if response is not None:
                # Returns the connection to the pool after a complete answer, and closes it otherwise.
                response.release()

    async def _send(self, url: str, body: bytes, headers: CIMultiDict[str]) -> aiohttp.ClientResponse:
        attempted = Attempted()
        started = self._clock.monotonic()
        try:
            return await self._pool.post(url, body=body, headers=headers, attempted=attempted, fresh=False)
        except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError) as error:
            young = self._clock.monotonic() - started < STALE_SECONDS
            if isinstance(error, aiohttp.ClientConnectorError) or not attempted.reused or not young:
                raise
        # The engine had closed this kept connection before it saw the request: the same engine gets it
        # once more, on a connection of its own.
        self._on_stale()
        return await self._pool.post(url, body=body, headers=headers, attempted=Attempted(), fresh=True)


async def _read_head(response: aiohttp.ClientResponse) -> bytes:
    if response.status < 400:
        return await response.content.readany()
    pieces: list[bytes] = []
    size = 0
    while size < ERROR_BODY_BYTES_MAX:
        piece = await response.content.readany()
        if not piece:
            break
        pieces.append(piece)
        size += len(piece)
    return b"".join(pieces)


def _error_answer(response: aiohttp.ClientResponse, head: bytes) -> ErrorAnswer | None:
    # Only these are of use to a client; the 500s speak of an engine that it need not know of.
    if response.status not in (502, 503) or not head or not response.content.at_eof():
        return None
    return ErrorAnswer(
        status=response.status,
        content_type=response.headers.get(hdrs.CONTENT_TYPE, "application/json"),
        body=head,
    )
