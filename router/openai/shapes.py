"""Errors in the shape that a route's clients expect: OpenAI's, OpenAI's for responses, or Anthropic's.

In come a refusal, an engine's own error, or the word that a stream broke; out come the bytes to send.
Engines answer `/v1/messages` partly in OpenAI's shape (vLLM: what its validation refuses), which
Anthropic's clients cannot read.
"""

from collections.abc import Mapping
from typing import Any

import orjson

from router.openai import sse
from router.openai.errors import Refusal
from router.openai.routes import Shape

# Error bodies are small; what is larger is no error that anybody could translate.
TRANSLATED_BYTES_MAX = 64 * 1024

# Anthropic's names, from the list of errors in its API reference.
_ANTHROPIC_TYPES: Mapping[int, str] = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    529: "overloaded_error",
}


def anthropic_type(status: int) -> str:
    """Names an error by its status."""
    return _ANTHROPIC_TYPES.get(status, "invalid_request_error" if status < 500 else "api_error")


def anthropic_error(status: int, message: str, request_id: str = "") -> bytes:
    """Builds a body of Anthropic's error shape."""
    document: dict[str, Any] = {
        "type": "error",
        "error": {"type": anthropic_type(status), "message": message},
    }
    if request_id:
        document["request_id"] = request_id
    return orjson.dumps(document)


def refusal_body(refusal: Refusal, shape: Shape, request_id: str) -> bytes:
    """Renders a refusal of the router."""
    if shape is Shape.ANTHROPIC:
        return anthropic_error(refusal.status, refusal.message, request_id)
    return refusal.body()


def translated(shape: Shape, status: int, body: bytes, request_id: str) -> bytes:
    """Renders an engine's error; returns it as it is where it has the shape already, or none at all."""
    if shape is not Shape.ANTHROPIC:
        return body
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError:
        return body
    error = document.get("error") if isinstance(document, dict) else None
    if isinstance(error, dict):
        message = error.get("message")
    else:
        # What the framework under an engine answers, or an error that is a mere text.
        message = document.get("detail", error) if isinstance(document, dict) else None
    if not isinstance(message, str):
        return body
    return anthropic_error(status, message, request_id)


def closing_error(shape: Shape, message: str, *, tail: bytes) -> bytes:
    """Builds the end of a stream that broke.

    Args:
        shape: Of the route.
        message: What happened.
        tail: Last bytes that went to the client; an unfinished event is ended first.
    """
    if shape is Shape.OPENAI:
        return sse.closing_error(message, code="upstream_error", tail=tail)
    separator = b"" if not tail or tail.endswith(b"\n\n") else b"\n\n"
    if shape is Shape.ANTHROPIC:
        return separator + b"event: error\ndata: " + anthropic_error(500, message) + b"\n\n"
    document = {"type": "error", "code": "upstream_error", "message": message, "param": None}
    return separator + b"event: error\ndata: " + orjson.dumps(document) + b"\n\n"


class ErrorTranslator:
    """Gives an engine's error body the shape of its route. Implements `router.upstream.relay.Transform`."""

    def __init__(self, shape: Shape, status: int, request_id: str) -> None:
        """Takes the route's shape, the status of the answer and the id of the request."""
        self._shape = shape
        self._status = status
        self._request_id = request_id
        self._held: list[bytes] | None = []
        self._bytes = 0

    def feed(self, piece: bytes) -> bytes:
        """Keeps the body; passes it on from where it is too long."""
        if self._held is None:
            return piece
        self._held.append(piece)
        self._bytes += len(piece)
        if self._bytes <= TRANSLATED_BYTES_MAX:
            return b""
        held, self._held = b"".join(self._held), None
        return held

    def finish(self) -> bytes:
        """Returns the body."""
        if self._held is None:
            return b""
        return translated(self._shape, self._status, b"".join(self._held), self._request_id)
