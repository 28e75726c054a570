"""What can go wrong with an attempt, and whose fault it is.

    client     what it sent, or its own connection: counts against nobody
    engine     it answered that it does not serve, or stayed silent
    transport  the way to it broke
    platform   we could not do our part

In come errors of sockets and answers of engines, out come an `AttemptFailed` with a cause from a
closed set. Foreign exceptions are translated here and nowhere else (law 5).
"""

import errno
from dataclasses import dataclass
from enum import StrEnum


class Owner(StrEnum):
    """Whose fault an error is."""

    CLIENT = "client"
    ENGINE = "engine"
    TRANSPORT = "transport"
    PLATFORM = "platform"


class Cause(StrEnum):
    """How an attempt failed; label of metrics."""

    CONNECT_REFUSED = "connect_refused"
    CONNECT_TIMEOUT = "connect_timeout"
    CONNECT_FAILED = "connect_failed"
    DISCONNECTED = "disconnected"
    STALE_CONNECTION = "stale_connection"
    FIRST_BYTE_TIMEOUT = "first_byte_timeout"
    ENGINE_UNAVAILABLE = "engine_unavailable"
    ENGINE_DRAINING = "engine_draining"
    ENGINE_DEAD = "engine_dead"
    # After the first byte, where another engine may go on with the stream.
    STREAM_BROKEN = "stream_broken"
    STREAM_FAILED = "stream_failed"
    CONTINUATION_REFUSED = "continuation_refused"


_ENGINE_CAUSES = {
    Cause.FIRST_BYTE_TIMEOUT,
    Cause.ENGINE_UNAVAILABLE,
    Cause.ENGINE_DRAINING,
    Cause.ENGINE_DEAD,
    Cause.STREAM_FAILED,
    Cause.CONTINUATION_REFUSED,
}


@dataclass(frozen=True, slots=True)
class ErrorAnswer:
    """An engine's own error, complete, as it came."""

    status: int
    content_type: str
    body: bytes


class AttemptFailed(Exception):
    """An attempt ended before its first byte went to the client.

    Attributes:
        cause: How.
        owner: Whose fault.
        answer: The engine's own error where it sent one that a client can use.
    """

    def __init__(self, cause: Cause, detail: str, *, answer: ErrorAnswer | None = None) -> None:
        super().__init__(f"{cause.value}: {detail}")
        self.cause = cause
        self.owner = Owner.ENGINE if cause in _ENGINE_CAUSES else Owner.TRANSPORT
        self.answer = answer

    @property
    def retryable(self) -> bool:
        """True when another endpoint may do better.

        After a first-byte time-out the client's patience is used up, and a prompt that is too heavy for
        one engine would take the others down in turn. An engine that refuses to go on with a stream
        speaks for its likes.
        """
        return self.cause not in (Cause.FIRST_BYTE_TIMEOUT, Cause.CONTINUATION_REFUSED)


# What engines say when they cannot serve at all; found in bodies of 500s and in first events of streams.
_NOT_SERVING: tuple[tuple[bytes, Cause], ...] = (
    # vLLM while it drains after SIGTERM.
    (b"cannot schedule new futures after shutdown", Cause.ENGINE_DRAINING),
    # vLLM whose engine process has died while its API server still answers.
    (b"EngineDeadError", Cause.ENGINE_DEAD),
    (b"EngineCore encountered an issue", Cause.ENGINE_DEAD),
)
_ERROR_EVENT = b'data: {"error"'


def cause_of_connecting(error: OSError) -> Cause:
    """Sorts what kept a connection from being made, looking up names and TLS included."""
    return Cause.CONNECT_REFUSED if error.errno == errno.ECONNREFUSED else Cause.CONNECT_FAILED


def cause_of_answer(status: int, head: bytes) -> Cause | None:
    """Tells why an answer means that the engine does not serve; None for an answer to pass on.

    Args:
        status: HTTP status.
        head: Beginning of the body.
    """
    if status in (502, 503):
        return Cause.ENGINE_UNAVAILABLE
    if status == 500 or (status == 200 and head.startswith(_ERROR_EVENT)):
        for text, cause in _NOT_SERVING:
            if text in head:
                return cause
    return None
