"""Writes an engine's answer to the client as it comes.

In come an `Answer` whose first bytes are there and the client's side of the request; out goes every byte,
unchanged or as a transform gives it, inside the callback that brought it. Starting an answer, relaying its
body and ending it are three calls, so that another engine's answer can go on where one broke off. What
breaks after the start is told inside the stream or by closing the connection, because the status is gone.
"""

from __future__ import annotations

import asyncio
from enum import Enum
from typing import TYPE_CHECKING, Protocol

from router.downstream import Downstream
from router.openai import sse
from router.openai.errors import REASON_HEADER, Reason
from router.record import RequestRecord
from router.upstream.headers import DEPLOYMENT_HEADER, ENDPOINT_HEADER

if TYPE_CHECKING:
    from router.upstream.answer import Answer


class Outcome(Enum):
    """How the relay of an answer ended."""

    COMPLETE = "complete"
    BROKEN = "broken"
    IDLE = "idle"
    CLIENT_GONE = "client_gone"
    CLIENT_STALLED = "client_stalled"


class Transform(Protocol):
    """Reads the body of an answer on its way, and may change it; called on the event loop, never waits."""

    def feed(self, piece: bytes) -> bytes:
        """Takes the next bytes and returns what goes to the client now; the very object where unchanged."""
        ...

    def finish(self) -> bytes:
        """Returns what is left to send after the last piece of a complete body."""
        ...


def start_answer(
    answer: Answer, downstream: Downstream, record: RequestRecord, *, keeps_length: bool = True
) -> None:
    """Gives the client status and headers of an engine's answer.

    Args:
        answer: The engine's.
        downstream: Not started yet.
        record: Says what to call the endpoint; its reason is set where the engine refused.
        keeps_length: False where a transform may change the length of the body.
    """
    headers = {**answer.client_headers, ENDPOINT_HEADER: record.endpoint}
    if record.why:
        headers[REASON_HEADER] = record.why
    if record.deployment != record.model:
        headers[DEPLOYMENT_HEADER] = record.deployment
    if answer.status >= 400:
        record.reason = Reason.ENGINE_CLIENT_ERROR if answer.status < 500 else Reason.ENGINE_ERROR
        headers[REASON_HEADER] = record.reason.value
    downstream.start(answer.status, headers, length=answer.length if keeps_length else None)


def finish_relay(answer: Answer, downstream: Downstream, transform: Transform | None) -> Outcome:
    """Writes what is left when an answer has ended; ends or breaks off nothing on the client's side.

    Args:
        answer: The engine's, which has ended. Where it broke, its `failure` says how.
        downstream: Started. A client that has refused to take a piece for too long is cut off.
        transform: What the body went through; None for nothing.
    """
    outcome = answer.outcome
    if outcome is Outcome.COMPLETE and transform is not None:
        downstream.write(transform.finish())
    elif outcome is Outcome.CLIENT_STALLED:
        downstream.abort()
    return outcome or Outcome.BROKEN


async def end_answer(downstream: Downstream, *, client_stall_seconds: float) -> Outcome:
    """Completes the client's answer and waits until the client has taken it, but for a bounded rest."""
    downstream.end()
    if not downstream.blocked:
        return Outcome.COMPLETE
    try:
        async with asyncio.timeout(client_stall_seconds):
            await downstream.drain()
    except ConnectionError:
        return Outcome.CLIENT_GONE
    except TimeoutError:
        downstream.abort()
        return Outcome.CLIENT_STALLED
    return Outcome.COMPLETE


def break_off(downstream: Downstream, error: bytes) -> None:
    """Ends the client's answer so that nothing looks complete: an error event, or a closed connection.

    Args:
        downstream: Started.
        error: Events that end a stream as an error.
    """
    if downstream.length is None and sse.is_event_stream(downstream.content_type):
        downstream.write(error)
        downstream.end(close=True)
    else:
        downstream.abort()
