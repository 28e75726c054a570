"""Chunks are read as RFC 9112 writes them, however they are cut, and not more freely."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.wire.chunks import ChunkDecoder
from router.wire.response_head import MalformedAnswer


def _encode(pieces: list[bytes]) -> bytes:
    return b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces if piece) + b"0\r\n\r\n"


@given(st.lists(st.binary(max_size=300), max_size=5), st.lists(st.integers(0, 2000), max_size=6))
def test_a_body_is_the_same_however_it_is_cut(pieces: list[bytes], places: list[int]) -> None:
    data = _encode(pieces) + b"next"
    cuts = sorted({0, len(data), *(place % len(data) for place in places)})
    decoder = ChunkDecoder()
    body = b"".join(decoder.feed(data[start:end]) for start, end in pairwise(cuts))
    assert body == b"".join(pieces)
    assert decoder.complete
    assert decoder.rest == b"next"


def test_extensions_and_trailers_are_read_and_dropped() -> None:
    decoder = ChunkDecoder()
    assert decoder.feed(b"3;name=value\r\nabc\r\n0\r\nX-Sum: 1\r\nX-Other: 2\r\n\r\n") == b"abc"
    assert decoder.complete
    assert decoder.rest == b""


@pytest.mark.parametrize(
    "data",
    [
        b"0x3\r\nabc\r\n",
        b"+3\r\nabc\r\n",
        b"-1\r\n",
        b" 3\r\nabc\r\n",
        b"3 \r\nabc\r\n",
        b"g\r\n",
        b"\r\n",
        b"3\nabc\r\n",
        b"3\r\nabcd\r\n",
        b"3\r\nabc\n0\r\n",
        b"1_0\r\n",
        b"f" * 16 + b"\r\n",
        b"3;" + b"x" * 300,
        b"0\r\nno colon\r\n\r\n",
        b"0\r\n" + b"X-Long: " + b"y" * 300,
        b"0\r\n" + b"X: 1\r\n" * 2000 + b"\r\n",
    ],
)
def test_what_is_no_chunk_is_refused(data: bytes) -> None:
    with pytest.raises(MalformedAnswer):
        ChunkDecoder().feed(data)


def test_it_tells_where_a_chunk_may_begin() -> None:
    decoder = ChunkDecoder()
    assert decoder.at_start
    decoder.feed(b"5\r\nab")
    assert not decoder.at_start
    decoder.feed(b"cde\r")
    assert not decoder.at_start
    decoder.feed(b"\n")
    assert decoder.at_start
