"""Reads the head of an engine's answer: status, headers, and how the body is framed.

In come the bytes up to the empty line, out comes an `AnswerHead`, or `MalformedAnswer` where the framing
cannot be trusted: two lengths, a length beside chunks, an unknown coding, broken lines. An engine is
believed about what it says, never about where its answer ends. Pure, but for a small cache: the heads of an
engine's answers within one second are mostly the same bytes.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from multidict import CIMultiDict, CIMultiDictProxy

# As much as aiohttp and uvicorn take in one line; engines' heads have a few hundred bytes.
HEAD_BYTES_MAX = 32 * 1024

_STATUS_LINE = re.compile(rb"HTTP/1\.([01]) ([1-5][0-9][0-9])(?: [^\r\n\x00]*)?\r\n")
_HEADER = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*([^\r\n\x00]*)\r\n")
_HEADERS = re.compile(rb"(?:[!#$%&'*+.^_`|~0-9A-Za-z-]+:[^\r\n\x00]*\r\n)*\r\n")
_DIGITS = re.compile(rb"[0-9]{1,18}")
_CACHED_MAX = 512


class MalformedAnswer(ValueError):
    """What the engine sent is no answer that can be framed."""


@dataclass(slots=True)
class AnswerHead:
    """Head of an answer.

    Attributes:
        status: HTTP status.
        headers: As the engine sent them.
        length: Bytes of the body; None for chunks, and for a body that ends with the connection.
        chunked: The body comes in chunks.
        keep_alive: The engine takes another request on this connection.
        forwarded: What `upstream.headers` has made of the headers for clients; None before the first time.
    """

    status: int
    headers: Mapping[str, str]
    length: int | None
    chunked: bool
    keep_alive: bool
    forwarded: dict[str, str] | None = None

    @property
    def ends_with_connection(self) -> bool:
        """The body has no end but that of the connection."""
        return self.length is None and not self.chunked


_cached: dict[bytes, AnswerHead] = {}


def parse_answer_head(raw: bytes) -> AnswerHead:
    """Reads a head.

    Args:
        raw: From the status line to the empty line, both included.

    Raises:
        MalformedAnswer: It cannot be trusted.
    """
    head = _cached.get(raw)
    if head is None:
        head = _parse(raw)
        if len(_cached) >= _CACHED_MAX:
            _cached.clear()
        if len(raw) <= 1024:
            _cached[raw] = head
    return head


def _parse(raw: bytes) -> AnswerHead:
    line = _STATUS_LINE.match(raw)
    if line is None:
        raise MalformedAnswer("the status line is not HTTP/1.1's")
    if _HEADERS.fullmatch(raw, line.end()) is None:
        raise MalformedAnswer("a header line is broken")
    status = int(line[2])
    headers: CIMultiDict[str] = CIMultiDict()
    for name, value in _HEADER.findall(raw, line.end()):
        headers.add(name.decode("ascii"), value.rstrip(b" \t").decode("utf-8", "surrogateescape"))
    codings = headers.getall("transfer-encoding", [])
    lengths = headers.getall("content-length", [])
    if codings and (lengths or len(codings) > 1 or codings[0].lower() != "chunked" or line[1] == b"0"):
        raise MalformedAnswer("the body's transfer coding is not plain chunks")
    length = _length(lengths)
    if status in (204, 304) or status < 200:
        length = 0
    connection = headers.get("connection", "").lower()
    return AnswerHead(
        status=status,
        headers=CIMultiDictProxy(headers),
        length=length,
        chunked=bool(codings) and length is None,
        keep_alive=line[1] == b"1" and "close" not in connection and (bool(codings) or length is not None),
    )


def _length(lengths: list[str]) -> int | None:
    if not lengths:
        return None
    if len(lengths) > 1 or _DIGITS.fullmatch(lengths[0].encode("utf-8", "surrogateescape")) is None:
        raise MalformedAnswer("the length of the body is no single number")
    return int(lengths[0])
