"""An engine is believed about what it says, never about where its answer ends."""

import pytest

from router.wire.response_head import MalformedAnswer, parse_answer_head


def _head(*lines: str, status: str = "HTTP/1.1 200 OK") -> bytes:
    return "\r\n".join((status, *lines, "", "")).encode("latin-1")


@pytest.mark.parametrize(
    ("raw", "length", "chunked", "keep_alive"),
    [
        (_head("Content-Length: 12"), 12, False, True),
        (_head("content-length:12", "Connection: keep-alive"), 12, False, True),
        (_head("Content-Length: 12", "Connection: Close"), 12, False, False),
        (_head("Transfer-Encoding: Chunked"), None, True, True),
        (_head(), None, False, False),
        (_head("Content-Length: 12", status="HTTP/1.0 200 OK"), 12, False, False),
        (_head("Content-Length: 12", status="HTTP/1.1 204"), 0, False, True),
        (_head("Content-Length: 12", status="HTTP/1.1 304 Not Modified"), 0, False, True),
        (_head(status="HTTP/1.1 100 Continue"), 0, False, True),
    ],
)
def test_framing(raw: bytes, length: int | None, chunked: bool, keep_alive: bool) -> None:
    head = parse_answer_head(raw)
    assert (head.length, head.chunked, head.keep_alive) == (length, chunked, keep_alive)
    assert head.ends_with_connection is (length is None and not chunked)
    assert parse_answer_head(raw) is head


def test_headers_are_found_in_any_case_and_keep_foreign_letters() -> None:
    head = parse_answer_head(_head("X-Name:  caf\xe9 \t", "CONTENT-TYPE: a/b"))
    assert head.headers["content-type"] == "a/b"
    assert head.headers["x-name"].encode("utf-8", "surrogateescape") == b"caf\xe9"


@pytest.mark.parametrize(
    "raw",
    [
        _head("Content-Length: 12", "Content-Length: 12"),
        _head("Content-Length: 12, 12"),
        _head("Content-Length: +12"),
        _head("Content-Length: 0x12"),
        _head("Content-Length:"),
        _head("Content-Length: -1"),
        _head("Content-Length: 12", "Transfer-Encoding: chunked"),
        _head("Transfer-Encoding: gzip, chunked"),
        _head("Transfer-Encoding: chunked", "Transfer-Encoding: chunked"),
        _head("Transfer-Encoding: chunked", status="HTTP/1.0 200 OK"),
        _head("No colon"),
        _head("X-Fold: a", " b"),
        _head("X Space: a"),
        _head("X-Null: a\0"),
        _head("X-Bare: a\nInjected: b"),
        _head("X-Return: a\rb"),
        _head(status="HTTP/2 200 OK"),
        _head(status="HTTP/1.1 20 OK"),
        _head(status="HTTP/1.1 600 No"),
        _head(status="ICY 200 OK"),
        b"\r\n" + _head(),
    ],
)
def test_what_cannot_be_framed_is_refused(raw: bytes) -> None:
    with pytest.raises(MalformedAnswer):
        parse_answer_head(raw)
