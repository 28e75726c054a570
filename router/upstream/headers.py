"""Which headers cross the router, in both directions.

In come the headers of one side, out come those for the other. Requests lose what belongs to a single
connection, the client's credentials and what we set ourselves; answers keep a short list.
"""

from collections.abc import Mapping

from core.telemetry import REQUEST_ID_HEADER, TRACE_PARENT_HEADER
from router.wire.headers import RequestHeaders

ENDPOINT_HEADER = "x-millrace-endpoint"
# Sent where the deployment is not the one that the client named: behind an alias, or as a fall-back.
DEPLOYMENT_HEADER = "x-millrace-deployment"

# RFC 9110 section 7.6.1, and the older names that are still met.
_HOP_BY_HOP = {
    b"connection",
    b"keep-alive",
    b"proxy-authenticate",
    b"proxy-authorization",
    b"proxy-connection",
    b"te",
    b"trailer",
    b"transfer-encoding",
    b"upgrade",
}
# The engine has no use for a client's credentials, so it must not see them.
_CREDENTIALS = {b"authorization", b"cookie", b"x-api-key", b"api-key"}
# Set anew for the engine. What is compressed tells no usage, and engines near by gain nothing by it.
_OURS = {
    b"accept-encoding",
    b"host",
    b"content-length",
    b"content-encoding",
    b"expect",
    REQUEST_ID_HEADER.encode(),
    TRACE_PARENT_HEADER.encode(),
}
_DROPPED = frozenset(_HOP_BY_HOP | _CREDENTIALS | _OURS)

_ANSWER_KEPT = ("Content-Type", "Content-Encoding", "Cache-Control", "Retry-After")


def request_headers(client: RequestHeaders, *, request_id: str, trace_parent: str) -> bytes:
    """Builds the header lines for the engine, without those of the host and of the body's length.

    Args:
        client: As they came.
        request_id: Becomes the engine's request id, too.
        trace_parent: W3C trace context.
    """
    forwarded = client.forwarded
    if forwarded is None:
        forwarded = client.forwarded = _forwarded(client)
    state = client.get("tracestate")
    if state is not None and client.get(TRACE_PARENT_HEADER) == trace_parent:
        # A trace state without its own parent means nothing.
        forwarded += b"tracestate: %b\r\n" % state.encode("utf-8", "surrogateescape")
    return b"%bx-request-id: %b\r\ntraceparent: %b\r\n" % (
        forwarded,
        request_id.encode(),
        trace_parent.encode(),
    )


def _forwarded(client: RequestHeaders) -> bytes:
    dropped = {b"tracestate"}
    for name, value in client.pairs:
        if name.lower() == b"connection":
            dropped.update(each.strip().lower() for each in value.split(b","))
    lines = [
        b"%b: %b\r\n" % (name, value)
        for name, value in client.pairs
        if name.lower() not in _DROPPED and name.lower() not in dropped
    ]
    if "content-type" not in client or b"content-type" in dropped:
        # Bodies are JSON, whatever the client called them.
        lines.append(b"content-type: application/json\r\n")
    if "accept-encoding" in client:
        lines.append(b"accept-encoding: identity\r\n")
    return b"".join(lines)


def answer_headers(engine: Mapping[str, str]) -> dict[str, str]:
    """Returns those of an engine's headers that the client gets; the router adds its own elsewhere."""
    return {name: engine[name] for name in _ANSWER_KEPT if name in engine}
