"""The hot path takes what it fully understands; everything else is aiohttp's."""

import pytest

from router.wire.request_head import HeadReader, RequestHead, may_become_hot, parse_request_head

ROUTES = {b"/v1/chat/completions": "/v1/chat/completions"}
LINE = b"POST /v1/chat/completions HTTP/1.1"
PARENT = b"00-" + b"a" * 32 + b"-" + b"b" * 16 + b"-01"


def _raw(*headers: bytes, line: bytes = LINE, usual: bool = True) -> bytes:
    lines = [line, *([b"Host: router:8080", b"Content-Length: 5"] if usual else []), *headers]
    return b"\r\n".join(lines) + b"\r\n\r\n"


def _parse(raw: bytes) -> RequestHead | None:
    return parse_request_head(raw, ROUTES)


def test_a_plain_request_is_taken() -> None:
    head = _parse(
        _raw(b"X-Request-Id: mine", b"traceparent: " + PARENT, b"X-Tab:\ta\tb \t", b"Connection: Keep-Alive")
    )
    assert head is not None
    assert (head.route, head.path, head.length) == ("/v1/chat/completions", "/v1/chat/completions", 5)
    assert (head.request_id, head.trace_id, head.trace_parent) == ("mine", "a" * 32, PARENT.decode())
    assert head.headers.get("x-tab") == "a\tb"
    assert head.headers.get("X-Tab") is None
    assert head.headers.get("absent", "other") == "other"


def test_a_query_is_kept_as_it_came() -> None:
    head = _parse(_raw(line=b"POST /v1/chat/completions?trace=1&b=~._- HTTP/1.1"))
    assert head is not None
    assert head.path == "/v1/chat/completions?trace=1&b=~._-"


def test_ids_that_cannot_be_used_are_none() -> None:
    head = _parse(_raw(b'X-Request-Id: "quoted"', b"traceparent: nonsense"))
    assert head is not None
    assert (head.request_id, head.trace_id, head.trace_parent) == (None, None, "")


@pytest.mark.parametrize(
    "raw",
    [
        _raw(line=b"GET /v1/chat/completions HTTP/1.1"),
        _raw(line=b"POST /v1/models HTTP/1.1"),
        _raw(line=b"POST /v1/chat/completions HTTP/1.0"),
        _raw(line=b"POST  /v1/chat/completions HTTP/1.1"),
        _raw(line=b"POST /v1/chat/completions?a=%20 HTTP/1.1"),
        _raw(line=b"POST http://router/v1/chat/completions HTTP/1.1"),
        b"\r\n" + _raw(),
        _raw(usual=False),
        _raw(b"Host: router", usual=False),
        _raw(b"Content-Length: 5", usual=False),
        _raw(b"Host: a b", b"Content-Length: 5", usual=False),
        _raw(b"Host: a", b"Content-Length: 05", usual=False),
        _raw(b"Host: a", b"Content-Length: +5", usual=False),
        _raw(b"Host: a", b"Content-Length: 5, 5", usual=False),
        _raw(b"Content-Length: 5"),
        _raw(b"content-length: 6"),
        _raw(b"Host: other"),
        _raw(b"X-Multi: 1", b"x-multi: 2"),
        _raw(b"Transfer-Encoding: chunked"),
        _raw(b"transfer-encoding: identity"),
        _raw(b"Connection: close"),
        _raw(b"Connection: keep-alive, X-Private"),
        _raw(b"Upgrade: h2c"),
        _raw(b"Expect: 100-continue"),
        _raw(b"Content-Encoding: gzip"),
        _raw(b"TE: trailers"),
        _raw(b"Trailer: X"),
        _raw(b"Sec-WebSocket-Key1: 1"),
        _raw(b"X-Latin: \xe9"),
        _raw(b"X-Null: a\0b"),
        _raw(b"X-Bare: a\nInjected: 1"),
        _raw(b"X-Return: a\rb"),
        _raw(b"X-Fold: a", b" b"),
        _raw(b"X-Empty:"),
        _raw(b"X Space: 1"),
        _raw(b"X-Space : 1"),
        _raw(b"No colon"),
        _raw(b"X-Long: " + b"x" * 8000),
        _raw(*(b"X-%d: 1" % number for number in range(101))),
    ],
)
def test_everything_else_is_left_to_aiohttp(raw: bytes) -> None:
    assert _parse(raw) is None


def test_a_connection_that_repeats_its_head_is_read_anew_where_anything_but_the_length_differs() -> None:
    reader = HeadReader(ROUTES)
    plain = _raw(b"X-Kept: 1")
    first = reader.read(plain)
    assert first is not None
    for length in (b"0", b"7", b"700000"):
        changed = plain.replace(b"Content-Length: 5", b"Content-Length: " + length)
        again = reader.read(changed)
        assert again is not None
        assert (again.length, again.headers) == (int(length), first.headers)
    for wrong in (
        plain.replace(b"Content-Length: 5", b"Content-Length: 05"),
        plain.replace(b"Content-Length: 5", b"Content-Length: 5, 5"),
        plain.replace(b"X-Kept: 1", b"Content-Length: 5"),
        plain.replace(b"Content-Length: 5", b"X-Other: 5"),
        plain.replace(b"POST", b"GET"),
        plain.replace(b"X-Kept: 1", b"Expect: 100-continue"),
    ):
        assert reader.read(wrong) is None
    other = reader.read(_raw(b"X-Kept: 2"))
    assert other is not None
    assert other.headers.get("x-kept") == "2"
    again = reader.read(plain)
    assert again is not None
    assert again.headers.get("x-kept") == "1"


def test_every_beginning_of_a_plain_head_may_become_hot() -> None:
    raw = _raw(b"X-Tab:\ta\tb ", b"Accept: */*")
    for end in range(len(raw) - 1):
        assert may_become_hot(raw[:end]), raw[:end]


@pytest.mark.parametrize(
    "data",
    [
        b"GET /",
        b"post",
        b"POST /v2",
        b"\r\nPOST",
        b"POST /v1/chat\r\n",
        LINE + b"\r\nHost router\r\n",
        LINE + b"\r\nHost: a\r\n b",
        LINE + b"\r\nHost: a\rb",
        LINE + b"\r\nHost: a\n",
        LINE + b"\r\nX: \x00",
        LINE + b"\r\nHost: " + b"x" * 8000,
    ],
)
def test_a_beginning_that_goes_wrong_is_left_to_aiohttp_at_once(data: bytes) -> None:
    assert not may_become_hot(data)
