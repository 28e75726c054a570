"""Takes the chunks of a body apart, as RFC 9112 section 7.1 writes them, and not one byte more freely.

In come pieces as the socket gives them, cut anywhere; out come the bytes of the body. Trailers are read and
dropped. Wrong sizes, bare line feeds and missing line ends raise, because a decoder that guesses where a
body ends lets its peer smuggle. Memory is bounded: no byte of the body is kept.
"""

import re
from enum import Enum

from router.wire.response_head import MalformedAnswer

# A size with an extension; engines send none.
_LINE_BYTES_MAX = 256
_TRAILER_BYTES_MAX = 8 * 1024
_SIZE = re.compile(rb"([0-9A-Fa-f]{1,15})(?:[ \t]*;[^\r\n\x00]*)?")

# The sizes of events are nearly all among these: a look-up reads and checks them at once.
SIZES = {b"%x" % size: size for size in range(1, 4096)}


class _Expects(Enum):
    SIZE = "size"
    DATA = "data"
    DATA_END = "data_end"
    TRAILER = "trailer"
    NOTHING = "nothing"


class ChunkDecoder:
    """Decodes one body.

    Attributes:
        at_start: The next byte begins a chunk: nothing of an earlier one is pending.
        complete: The last chunk and its trailers have come.
        rest: What came after them; belongs to no answer.
    """

    __slots__ = ("_expects", "_held", "_left", "_trailer_bytes", "at_start", "complete", "rest")

    def __init__(self) -> None:
        self.at_start = True
        self.complete = False
        self.rest = b""
        self._expects = _Expects.SIZE
        self._held = b""
        self._left = 0
        self._trailer_bytes = 0

    def feed(self, data: bytes) -> bytes:
        """Takes the next piece and returns the bytes of the body in it.

        Raises:
            MalformedAnswer: These are no chunks.
        """
        if self._held:
            data = self._held + data
            self._held = b""
        pieces: list[bytes] = []
        at = 0
        while at < len(data):
            after = self._step(data, at, pieces)
            if after == at:
                self._held = data[at:]
                break
            at = after
        self.at_start = self._expects is _Expects.SIZE and not self._held
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _step(self, data: bytes, at: int, pieces: list[bytes]) -> int:
        """Reads one element; returns where the next begins, or `at` where it has not come completely."""
        if self._expects is _Expects.DATA:
            piece = data[at : at + self._left]
            pieces.append(piece)
            self._left -= len(piece)
            if not self._left:
                self._expects = _Expects.DATA_END
            return at + len(piece)
        if self._expects is _Expects.DATA_END:
            if not b"\r\n".startswith(data[at : at + 2]):
                raise MalformedAnswer("a chunk does not end where its size says")
            if len(data) - at < 2:
                return at
            self._expects = _Expects.SIZE
            return at + 2
        if self._expects is _Expects.NOTHING:
            self.rest += data[at:]
            return len(data)
        end = data.find(b"\r\n", at, at + _LINE_BYTES_MAX)
        if end < 0:
            if len(data) - at >= _LINE_BYTES_MAX or b"\n" in data[at:]:
                raise MalformedAnswer("a line between chunks has no end")
            return at
        self._line(data[at:end])
        return end + 2

    def _line(self, line: bytes) -> None:
        if self._expects is _Expects.SIZE:
            size = SIZES.get(line)
            if size is None:
                match = _SIZE.fullmatch(line)
                if match is None:
                    raise MalformedAnswer("the size of a chunk is no hexadecimal number")
                size = int(match[1], 16)
            self._left = size
            self._expects = _Expects.DATA if size else _Expects.TRAILER
        elif not line:
            self.complete = True
            self._expects = _Expects.NOTHING
        else:
            self._trailer_bytes += len(line) + 2
            if b":" not in line or b"\n" in line or self._trailer_bytes > _TRAILER_BYTES_MAX:
                raise MalformedAnswer("the trailers are broken or too long")
