"""Server-sent events: the few that the router writes itself.

In comes an error, out come the bytes that end a stream the way OpenAI clients understand. The router
neither parses nor re-chunks what engines send.
"""

from router.openai.errors import error_body

CONTENT_TYPE = "text/event-stream"

_DONE = b"data: [DONE]\n\n"


def is_event_stream(content_type: str) -> bool:
    """Tells whether a response is a stream of events."""
    return content_type.partition(";")[0].strip().lower() == CONTENT_TYPE


def closing_error(message: str, *, code: str, tail: bytes) -> bytes:
    """Builds the end of a stream that broke: an error event, then [DONE].

    Args:
        message: What happened.
        code: OpenAI's `code`.
        tail: Last bytes that went to the client; an unfinished event is ended first.
    """
    separator = b"" if not tail or tail.endswith(b"\n\n") else b"\n\n"
    return separator + b"data: " + error_body(message, kind="server_error", code=code) + b"\n\n" + _DONE
