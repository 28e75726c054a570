"""Recognises the requests of the hot path, by their heads alone.

In come the bytes of a head, out comes a `RequestHead`, or None: for every request that is not plainly one of
those that the hot path takes. None is no refusal. Such a request goes, byte for byte, to aiohttp's parser,
which decides about it; so the hot path can only be stricter than aiohttp, never laxer, and needs no answers
of its own for what is malformed. Pure.

What it takes: POST, a known route, HTTP/1.1, a query of plain characters, header lines of visible ASCII, no
name twice, a host, one length, and nothing that changes framing or the connection.
"""

import re
from collections.abc import Mapping

from core.telemetry import REQUEST_ID_HEADER, TRACE_PARENT_HEADER, given_request_id, trace_id_of
from router.wire.headers import RequestHeaders

# aiohttp allows 8190 bytes a line and 128 lines; a head that is smaller as a whole breaks neither bound.
HEAD_BYTES_MAX = 8000
_HEADERS_MAX = 100

_BEGINNING = b"POST /v1/"
_REQUEST_LINE = re.compile(rb"POST (/[A-Za-z0-9/_-]+)(\?[A-Za-z0-9._~=&-]*)? HTTP/1\.1\r\n")
_HEADERS = re.compile(rb"(?:[!#$%&'*+.^_`|~0-9A-Za-z-]+:[ \t]*[\x21-\x7e][\x20-\x7e\t]*\r\n)+\r\n")
_INCOMPLETE_HEADERS = re.compile(
    rb"(?:[!#$%&'*+.^_`|~0-9A-Za-z-]+:[ \t]*[\x21-\x7e][\x20-\x7e\t]*\r\n)*"
    rb"(?:[!#$%&'*+.^_`|~0-9A-Za-z-]+(?::[ \t]*(?:[\x21-\x7e][\x20-\x7e\t]*\r?)?)?|\r)?"
)
_HEADER = re.compile(rb"([^:]+):[ \t]*([\x20-\x7e\t]*)\r\n")
_LENGTH = re.compile(r"0|[1-9][0-9]{0,14}")
_LENGTH_LINE = re.compile(rb"\r\ncontent-length: *(0|[1-9][0-9]{0,14})\r\n", re.IGNORECASE)
_HOST = re.compile(r"[A-Za-z0-9._\[\]:-]+")

# Whoever sends one of these wants more than a plain request.
_UNUSUAL = frozenset(
    {
        "content-encoding",
        "expect",
        "http2-settings",
        "sec-websocket-key1",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
    }
)
_KEEP_ALIVE = "keep-alive"


class RequestHead:
    """Head of a request of the hot path; nobody changes it once it is made.

    Attributes:
        route: Its route.
        path: The route with its query.
        headers: All of them.
        length: Bytes of the body.
        request_id: The client's; None where it gave none that can be used.
        trace_id: Of the client's trace context; None without one.
        trace_parent: The client's `traceparent`; empty without a valid one.
    """

    __slots__ = ("headers", "length", "path", "request_id", "route", "trace_id", "trace_parent")

    def __init__(
        self,
        *,
        route: str,
        path: str,
        headers: RequestHeaders,
        length: int,
        request_id: str | None,
        trace_id: str | None,
        trace_parent: str,
    ) -> None:
        self.route = route
        self.path = path
        self.headers = headers
        self.length = length
        self.request_id = request_id
        self.trace_id = trace_id
        self.trace_parent = trace_parent

    def with_length(self, length: int) -> "RequestHead":
        """Returns the same head of a body with another length."""
        return RequestHead(
            route=self.route,
            path=self.path,
            headers=self.headers,
            length=length,
            request_id=self.request_id,
            trace_id=self.trace_id,
            trace_parent=self.trace_parent,
        )


def may_become_hot(data: bytes) -> bool:
    """Tells whether bytes without an empty line may be the beginning of a head of the hot path.

    False as soon as a byte stands where it may not, so that aiohttp refuses what it would refuse at once.
    """
    if len(data) > HEAD_BYTES_MAX:
        return False
    line = _REQUEST_LINE.match(data)
    if line is None:
        return data[: len(_BEGINNING)] == _BEGINNING[: len(data)] and b"\n" not in data
    return _INCOMPLETE_HEADERS.fullmatch(data, line.end()) is not None


def parse_request_head(raw: bytes, routes: Mapping[bytes, str]) -> RequestHead | None:
    """Reads a head.

    Args:
        raw: From the request line to the empty line, both included.
        routes: Those that the hot path serves, by their path.
    """
    line = _REQUEST_LINE.match(raw)
    if line is None or len(raw) > HEAD_BYTES_MAX:
        return None
    route = routes.get(line[1])
    if route is None or _HEADERS.fullmatch(raw, line.end()) is None:
        return None
    pairs = [(name, value.rstrip(b" \t")) for name, value in _HEADER.findall(raw, line.end())]
    headers = RequestHeaders(pairs)
    length = headers.get("content-length", "")
    if len(headers) != len(pairs) or len(pairs) > _HEADERS_MAX or not _is_plain(headers):
        return None
    if _LENGTH.fullmatch(length) is None:
        return None
    trace_id = trace_id_of(headers)
    return RequestHead(
        route=route,
        path=route + (line[2] or b"").decode("ascii"),
        headers=headers,
        length=int(length),
        request_id=given_request_id(headers.get(REQUEST_ID_HEADER)),
        trace_id=trace_id,
        trace_parent=headers.get(TRACE_PARENT_HEADER, "") if trace_id else "",
    )


class HeadReader:
    """Reads the heads of one connection, whose requests mostly differ in nothing but their length."""

    __slots__ = ("_after", "_before", "_head", "_raw", "_routes")

    def __init__(self, routes: Mapping[bytes, str]) -> None:
        """Takes the routes of the hot path, by their path."""
        self._routes = routes
        self._raw = self._before = self._after = b""
        self._head: RequestHead | None = None

    def read(self, raw: bytes) -> RequestHead | None:
        """Reads a head as `parse_request_head` does; its headers may be those of an earlier request.

        The two are the same but for `content-length`, which is told by `RequestHead.length` alone.
        """
        known = self._head
        if known is not None and raw == self._raw:
            return known
        line = _LENGTH_LINE.search(raw)
        if line is None:
            return None
        start, end = line.span(1)
        if known is not None and raw[:start] == self._before and raw[end:] == self._after:
            length = int(line[1])
            return known if length == known.length else known.with_length(length)
        head = parse_request_head(raw, self._routes)
        if head is not None:
            self._head, self._raw, self._before, self._after = head, raw, raw[:start], raw[end:]
        return head


def _is_plain(headers: RequestHeaders) -> bool:
    host = headers.get("host")
    if host is None or _HOST.fullmatch(host) is None:
        return False
    if headers.get("connection", _KEEP_ALIVE).lower() != _KEEP_ALIVE:
        return False
    return not any(name in headers for name in _UNUSUAL)
