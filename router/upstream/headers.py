"""Which headers cross the router, in both directions.

In come the headers of one side, out come those for the other. Requests lose what belongs to a single
connection, the client's credentials and what we set ourselves; answers keep a short list.
"""

from collections.abc import Mapping

from aiohttp import hdrs
from multidict import CIMultiDict, CIMultiDictProxy

from core.telemetry import REQUEST_ID_HEADER, TRACE_PARENT_HEADER

ENDPOINT_HEADER = "x-millrace-endpoint"

# RFC 9110 section 7.6.1, and the older names that are still met.
_HOP_BY_HOP = {
    "connection",
    "keep-alive",
    "proxy-authenticate",
    "proxy-authorization",
    "proxy-connection",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
}
# The engine has no use for a client's credentials, so it must not see them.
_CREDENTIALS = {"authorization", "cookie", "x-api-key", "api-key"}
# Set anew for the engine.
_OURS = {"host", "content-length", "content-encoding", "expect", REQUEST_ID_HEADER, TRACE_PARENT_HEADER}
_DROPPED = frozenset(_HOP_BY_HOP | _CREDENTIALS | _OURS)

_ANSWER_KEPT = (
    hdrs.CONTENT_TYPE,
    hdrs.CONTENT_ENCODING,
    hdrs.CACHE_CONTROL,
    hdrs.RETRY_AFTER,
)


def request_headers(client: CIMultiDictProxy[str], *, request_id: str, trace_parent: str) -> CIMultiDict[str]:
    """Builds the headers for the engine.

    Args:
        client: As they came.
        request_id: Becomes the engine's request id, too.
        trace_parent: W3C trace context.
    """
    named = {
        name.strip().lower() for value in client.getall(hdrs.CONNECTION, ()) for name in value.split(",")
    }
    forwarded: CIMultiDict[str] = CIMultiDict()
    for name, value in client.items():
        lowered = name.lower()
        if lowered not in _DROPPED and lowered not in named:
            forwarded.add(name, value)
    # Bodies are JSON, whatever the client called them.
    forwarded.setdefault(hdrs.CONTENT_TYPE, "application/json")
    forwarded[REQUEST_ID_HEADER] = request_id
    if forwarded.get("tracestate") is not None and client.get(TRACE_PARENT_HEADER) != trace_parent:
        # A trace state without its own parent means nothing.
        forwarded.popall("tracestate")
    forwarded[TRACE_PARENT_HEADER] = trace_parent
    return forwarded


def answer_headers(engine: Mapping[str, str], *, replica: str) -> CIMultiDict[str]:
    """Builds the headers for the client; the request id is added to every response elsewhere."""
    kept: CIMultiDict[str] = CIMultiDict()
    for name in _ANSWER_KEPT:
        value = engine.get(name)
        if value is not None:
            kept[name] = value
    kept[ENDPOINT_HEADER] = replica
    return kept
