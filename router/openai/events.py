"""Cuts a stream of server-sent events into whole events, whatever the pieces are that it comes in.

In come pieces of bytes, out come complete events as they came, their terminators included: joined they
give back the stream. Lines end in LF, CR LF or CR, as the specification allows. What is incomplete is held
back, up to a bound. Nothing is decoded here except where `data_of` is asked.
"""

import re
from collections.abc import Iterator
from typing import Any

import orjson

# An event longer than this is no event that anybody here understands; vLLM's longest repeats the whole
# answer at the end of a `/v1/responses` stream.
EVENT_BYTES_MAX = 4 * 1024 * 1024

# Two line ends. A CR at the very end may be the first half of CR LF, so it is left for the next piece.
_BLANK_LINE = re.compile(rb"(?>\r\n|\n|\r(?!\Z)){2}")
_LINE_END = re.compile(rb"\r\n|\n|\r")

DONE = b"[DONE]"


class EventTooLong(Exception):
    """An event passes the bound. The cutter is empty; all that it held and was fed with is in `text`."""

    def __init__(self, text: bytes) -> None:
        super().__init__(f"an event is longer than {EVENT_BYTES_MAX} bytes")
        self.text = text


class EventCutter:
    """Holds the beginning of the next event.

    Attributes:
        held: Bytes of an event whose end has not come.
    """

    __slots__ = ("held",)

    def __init__(self) -> None:
        self.held = b""

    def feed(self, piece: bytes) -> list[bytes]:
        """Takes a piece and returns the events that are complete now.

        Raises:
            EventTooLong: An event passes the bound.
        """
        if self.held:
            piece = self.held + piece
        events = []
        if piece.find(b"\r") < 0:
            *whole, self.held = piece.split(b"\n\n")
            events = [event + b"\n\n" for event in whole]
        else:
            start = 0
            for found in _BLANK_LINE.finditer(piece):
                events.append(piece[start : found.end()])
                start = found.end()
            self.held = piece[start:]
        if len(self.held) > EVENT_BYTES_MAX:
            self.held = b""
            raise EventTooLong(piece)
        return events

    def rest(self) -> bytes:
        """Returns what is held back and forgets it."""
        held, self.held = self.held, b""
        return held


def data_of(event: bytes) -> bytes:
    """Returns the data of one event: the values of its `data` lines, joined by LF; empty for a comment."""
    values = [_value(line) for line in _LINE_END.split(event) if line.startswith(b"data")]
    return b"\n".join(value for value in values if value is not None)


def _value(line: bytes) -> bytes | None:
    name, _, value = line.partition(b":")
    return value.removeprefix(b" ") if name == b"data" else None


def document_of(event: bytes) -> dict[str, Any] | None:
    """Returns the JSON object that an event carries; None where it carries none."""
    try:
        document = orjson.loads(data_of(event))
    except orjson.JSONDecodeError:
        return None
    return document if isinstance(document, dict) else None


def object_end(text: bytes, start: int) -> int:
    """Returns where the JSON object that begins at `start` ends, exclusive; -1 where it does not end.

    Braces inside strings do not count.
    """
    depth = 0
    for token in _structure(text, start):
        depth += 1 if text[token] == ord("{") else -1
        if depth == 0:
            return token + 1
    return -1


# A string, which may not end here, or a brace.
_STRUCTURE = re.compile(rb'"(?:[^"\\]|\\.)*+"?|[{}]', re.DOTALL)


def _structure(text: bytes, start: int) -> Iterator[int]:
    for found in _STRUCTURE.finditer(text, start):
        if text[found.start()] != ord('"'):
            yield found.start()
