"""Writes an engine's answer to the client as it comes.

In come an `Answer` whose first bytes are there and the client's connection; out goes every byte
unchanged. Back-pressure goes through: the next piece is read when the last one has been taken. What
breaks from here on is told inside the stream or by closing the connection, because the status is gone.
"""

import asyncio
from enum import Enum

from aiohttp import hdrs, web

from router.openai import sse
from router.openai.errors import REASON_HEADER, Reason
from router.record import RequestRecord
from router.upstream.failures import AnswerBroken
from router.upstream.forward import Answer
from router.upstream.headers import answer_headers


class Outcome(Enum):
    """How the relay of an answer ended."""

    COMPLETE = "complete"
    BROKEN = "broken"
    IDLE = "idle"
    CLIENT_GONE = "client_gone"
    CLIENT_STALLED = "client_stalled"


async def relay(
    request: web.Request, answer: Answer, record: RequestRecord, *, client_stall_seconds: float
) -> tuple[web.StreamResponse, Outcome]:
    """Relays an answer to its end.

    Args:
        request: The client's.
        answer: The engine's.
        record: Says what to call the endpoint; its reason is set where the engine refused.
        client_stall_seconds: How long a client may refuse to take a piece.

    Returns:
        The response, on which nothing more may be written, and how it ended.
    """
    response = _response_for(answer, record)
    tail = b""
    try:
        async with asyncio.timeout(client_stall_seconds):
            await response.prepare(request)
        piece = answer.head
        while piece:
            async with asyncio.timeout(client_stall_seconds):
                await response.write(piece)
            tail = piece[-2:]
            try:
                piece = await answer.next_piece()
            except AnswerBroken as error:
                await _break_off(request, response, f"The engine's answer broke off: {error}", tail)
                return response, Outcome.BROKEN
            except TimeoutError:
                await _break_off(request, response, "The engine stopped sending.", tail)
                return response, Outcome.IDLE
        async with asyncio.timeout(client_stall_seconds):
            await response.write_eof()
    except ConnectionError:
        return response, Outcome.CLIENT_GONE
    except TimeoutError:
        _abort(request)
        return response, Outcome.CLIENT_STALLED
    return response, Outcome.COMPLETE


def _response_for(answer: Answer, record: RequestRecord) -> web.StreamResponse:
    response = web.StreamResponse(
        status=answer.status, headers=answer_headers(answer.headers, replica=record.endpoint)
    )
    length = answer.headers.get(hdrs.CONTENT_LENGTH, "")
    if length.isdigit():
        response.content_length = int(length)
    if answer.status >= 400:
        record.reason = Reason.ENGINE_CLIENT_ERROR if answer.status < 500 else Reason.ENGINE_ERROR
        response.headers[REASON_HEADER] = record.reason.value
    return response


async def _break_off(request: web.Request, response: web.StreamResponse, message: str, tail: bytes) -> None:
    response.force_close()
    if sse.is_event_stream(response.content_type) and response.content_length is None:
        await response.write(sse.closing_error(message, code="upstream_error", tail=tail))
        await response.write_eof()
        return
    # Nothing may look like a complete answer: the connection ends before the body does.
    _abort(request)


def _abort(request: web.Request) -> None:
    if request.transport is not None:
        request.transport.abort()
