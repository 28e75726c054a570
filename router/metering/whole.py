"""Reads usage from an answer in one piece, without keeping more of it than a bound.

In come the bytes of a JSON body, which pass untouched; out comes its top-level `usage`. A small body is
parsed, or only its end where that says the same for certain. Of a large one (embeddings, log probabilities)
only the last part is kept, and `usage` is looked for from its end: the text from there to the end of the
body, with one brace before it, is JSON exactly if `usage` stands at the top level. Where the engine writes
more after it than is kept, the last object of that name that has gone by counts.
"""

from typing import Final

import orjson

from router.metering.usage import UNKNOWN, TokenCounts, counts_of
from router.openai.events import object_end

# Parsing this takes less than a millisecond; chat answers have some kilobytes.
PARSED_BYTES_MAX = 256 * 1024
# What engines write after `usage` in large bodies is short, or is log probabilities of the prompt.
TAIL_BYTES = 64 * 1024
# A usage object has some hundred bytes; vLLM lists tokens by turn in those of `/v1/responses`.
_USAGE_BYTES_MAX = 8 * 1024
# Tries, from the end, at finding the one at the top level.
_TRIES_MAX = 8

_KEY: Final = b'"usage"'
_BACKSLASH: Final = 92


class WholeMeter:
    """Meters one body. Implements `router.metering.stream.Meter`."""

    def __init__(self, *, encoded: bool = False) -> None:
        """Takes whether the body is compressed: then nothing is read."""
        self.error = ""
        self.error_is_clients = False
        self.ended = False
        self._encoded = encoded
        self._pieces: list[bytes] = []
        self._bytes = 0
        self._whole = True
        self._gone_by: TokenCounts | None = None

    def feed(self, piece: bytes) -> bytes:
        """Takes bytes of the engine and returns them."""
        if self._encoded:
            return piece
        self._pieces.append(piece)
        self._bytes += len(piece)
        if self._bytes > PARSED_BYTES_MAX:
            self._forget()
        return piece

    def finish(self) -> bytes:
        """Returns nothing: nothing is held back."""
        return b""

    def counts(self) -> TokenCounts:
        """Returns the usage of the body; unknown before its end, or where there is none."""
        kept = self._joined()
        if self._whole:
            try:
                document = orjson.loads(kept)
            except orjson.JSONDecodeError:
                return UNKNOWN
            return (counts_of(document.get("usage")) if isinstance(document, dict) else None) or UNKNOWN
        return _last_usage(kept) or self._gone_by or UNKNOWN

    def counts_of_complete(self) -> TokenCounts:
        """Returns the usage of a body that has come to its end: the same as `counts`, for less."""
        if self._whole and not self._encoded:
            counts = usage_at_end(self._joined())
            if counts is not None:
                return counts
        return self.counts()

    def _joined(self) -> bytes:
        pieces = self._pieces
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _forget(self) -> None:
        """Keeps the end only, and what usage the rest held."""
        kept = self._joined()
        self._whole = False
        at = kept.rfind(_KEY, 0, len(kept) - TAIL_BYTES + _USAGE_BYTES_MAX)
        if at >= 0:
            self._gone_by = _object_at(kept, at) or self._gone_by
        self._pieces = [kept[-TAIL_BYTES:]]
        self._bytes = TAIL_BYTES


def usage_at_end(body: bytes) -> TokenCounts | None:
    """Reads the top-level `usage` of a JSON document from its end, without parsing what stands before it.

    It is the last member of that name, which is the one that counts, because:
    - before the text `"usage"` stands no backslash, so its quotes begin and end a string: outside of strings
      there is no other text between quotes;
    - with a brace before it, the rest of the document is an object: the string is a name, and the brace that
      ends the document ends the object that the name is in, which therefore is the whole document;
    - nothing behind it has a backslash, so that nothing behind it spells the name otherwise.

    Args:
        body: A JSON document that is complete; of anything else the answer may be wrong.

    Returns:
        The counts, or None where the whole has to be parsed to know.
    """
    at = body.rfind(_KEY)
    if at <= 0 or body[at - 1] == _BACKSLASH:
        return None
    tail = body[at:]
    if tail.find(b"\\") >= 0:
        return None
    try:
        document = orjson.loads(b"{" + tail)
    except orjson.JSONDecodeError:
        return None
    return counts_of(document["usage"])


def _last_usage(tail: bytes) -> TokenCounts | None:
    """Finds the last top-level `usage` in the end of a body."""
    at = len(tail)
    for _ in range(_TRIES_MAX):
        at = tail.rfind(_KEY, 0, at)
        if at < 0:
            return None
        try:
            document = orjson.loads(b"{" + tail[at:])
        except orjson.JSONDecodeError:
            continue
        return counts_of(document.get("usage"))
    return None


def _object_at(text: bytes, at: int) -> TokenCounts | None:
    start = text.find(b"{", at, at + len(_KEY) + 4)
    end = object_end(text[: start + _USAGE_BYTES_MAX], start) if start >= 0 else -1
    if end < 0:
        return None
    try:
        return counts_of(orjson.loads(text[start:end]))
    except orjson.JSONDecodeError:
        return None
