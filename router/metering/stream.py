"""Reads usage from a stream of events while it passes, and takes out what only the router asked for.

In come an engine's bytes in whatever pieces, out go the bytes for the client: exactly those that it would
have had without the router's asking. vLLM moves `system_fingerprint` from the last chunk of an answer to
the usage chunk when there is one, so that last chunk waits for the next event, which comes at once, and
gets it back. Events are cut, never re-encoded. The hot path, one small event a piece, looks for four short
texts in it; what is parsed is parsed because something is unusual. Needles are JSON syntax: inside strings
quotes are escaped, so no text of a model can hold them. Nothing here waits or knows of connections.
"""

import re
from collections.abc import Mapping
from typing import Any, Final, Protocol

import orjson

from router.metering.ask import Asked
from router.metering.usage import UNKNOWN, TokenCounts, counts_of
from router.openai.events import DONE, EventCutter, EventTooLong, data_of, document_of, object_end

_UNFINISHED: Final = b'"finish_reason":null'
_USAGE_MEMBER: Final = b',"usage":{'
_USAGE_KEY: Final = b'"usage"'
_USAGE_MEMBER_BYTES: Final = len(_USAGE_MEMBER)
_LF: Final = 10
_DATA: Final = b"data: "
_DATA_BYTES: Final = len(_DATA)
_DONE_EVENT: Final = b"data: [DONE]\n\n"
_INDEX: Final = re.compile(rb'"choices":\[\{"index":(\d+)')
_FINGERPRINT_KEY: Final = b',"system_fingerprint":'
_FINGERPRINT: Final = re.compile(rb',"system_fingerprint":"(?:[^"\\]|\\.)*"')


class Meter(Protocol):
    """Reads one answer.

    Attributes:
        error: What the engine said in an error event; empty where it said none.
        error_is_clients: The error event speaks of the request, not of the engine.
        ended: The answer has come to its own end, as its format has it.
    """

    @property
    def error(self) -> str:
        """What the engine said in an error event; empty where it said none."""
        ...

    @property
    def error_is_clients(self) -> bool:
        """The error event speaks of the request, not of the engine."""
        ...

    @property
    def ended(self) -> bool:
        """The answer has come to its own end, as its format has it."""
        ...

    def feed(self, piece: bytes) -> bytes:
        """Takes bytes of the engine and returns those for the client."""
        ...

    def finish(self) -> bytes:
        """Returns what was held back; called once, at the end of the bytes, however they ended."""
        ...

    def counts(self) -> TokenCounts:
        """Returns what is known of the usage."""
        ...


class CompletionMeter:
    """Meters a stream of chat or text completion chunks."""

    def __init__(self, asked: Asked, *, asking: bool) -> None:
        """Takes what the client asked for, and whether the router asked the engine beyond that."""
        self.error = ""
        self.error_is_clients = False
        self.ended = False
        self._asked = asked
        self._asking = asking
        self._single = asked.single
        # False for several choices, and while an event waits.
        self._quick = asked.single
        self._strip = asking and not asked.continuous
        self._strip_last = asking and not asked.usage
        self._cutter = EventCutter()
        # An event that waits for the usage chunk.
        self._waiting = b""
        self._running = b""
        self._running_by_choice: dict[int, bytes] = {}
        self._deltas = 0
        self._last: Mapping[str, Any] | None = None
        self._lost = False

    def feed(self, piece: bytes) -> bytes:
        """Takes bytes of the engine and returns those for the client."""
        # One line and an empty one: one whole event. What is near its end is found fastest from there.
        if not self._cutter.held and piece.find(b"\n") == len(piece) - 2 and piece[-1] == _LF:
            if self._quick:
                at = piece.rfind(_USAGE_MEMBER)
                if at > 0:
                    end = piece.find(b"}", at)
                    nested = piece.find(b"{", at + _USAGE_MEMBER_BYTES, end) > 0
                    if not nested and piece.rfind(_UNFINISHED, 0, at) > 0:
                        self._running = piece
                        return piece[:at] + piece[end + 1 :] if self._strip else piece
                elif piece.rfind(_UNFINISHED) > 0 and piece.find(_USAGE_KEY) < 0:
                    self._deltas += 1
                    return piece
            # A lone CR would end a line, too.
            if piece.find(b"\r") < 0:
                return self._event(piece)
        return self._feed_slowly(piece)

    def finish(self) -> bytes:
        """Returns what was held back."""
        waiting, self._waiting = self._waiting, b""
        return waiting + self._cutter.rest()

    def counts(self) -> TokenCounts:
        """Returns the engine's last word, else what its chunks added up to."""
        if self._last is not None:
            return counts_of(self._last) or UNKNOWN
        if self._running_by_choice:
            return self._sum_choices()
        if self._running:
            running = counts_of(_usage_of(self._running))
            if running is not None:
                return TokenCounts(running.prompt, running.completion, running.cached, exact=not self._lost)
        return TokenCounts(completion=self._deltas)

    def _feed_slowly(self, piece: bytes) -> bytes:
        try:
            events = self._cutter.feed(piece)
        except EventTooLong as error:
            # Whatever it is, it is not ours to keep back.
            self._lost = True
            before, self._waiting, self._quick = self._waiting, b"", self._single
            return before + error.text
        return b"".join(map(self._event, events))

    def _event(self, event: bytes) -> bytes:
        before, self._waiting, self._quick = self._waiting, b"", self._single
        # `in` asks bytes for a number first, which costs more than the search.
        if event.find(_UNFINISHED) >= 0:
            return before + self._chunk(event)
        if event == _DONE_EVENT:
            self.ended = True
            return before + event
        document = _document(event)
        if document is None:
            data = data_of(event)
            if before and not data:
                # A comment between the last chunk and the usage chunk.
                return self._wait(before + event)
            self.ended = self.ended or data == DONE
        elif document.get("error"):
            self.error = self.error or message_of_error(document["error"])
            self.error_is_clients = is_clients_error(document["error"])
        else:
            return self._unusual(before, event, document)
        return before + event

    def _unusual(self, before: bytes, event: bytes, document: dict[str, Any]) -> bytes:
        """Takes the usage chunk, the last chunk with a choice, or what some engine writes beside them."""
        choices = document.get("choices")
        usage = document.get("usage")
        if choices == [] and isinstance(usage, dict):
            self._last = usage
            return _with_fingerprint(before, event) if self._strip_last else before + event
        if choices:
            if not self._asking and isinstance(usage, dict):
                # One event that holds a whole answer, as vLLM writes it after a beam search.
                self._last = usage
            event = self._chunk(event)
            if self._strip_last and self._single and _is_finish(choices):
                return self._wait(before + event)
        return before + event

    def _wait(self, event: bytes) -> bytes:
        self._waiting, self._quick = event, False
        return b""

    def _chunk(self, event: bytes) -> bytes:
        """Takes a chunk with choices and returns it without the usage that the client did not ask for."""
        at = event.rfind(_USAGE_MEMBER)
        end = event.find(b"}", at) + 1 if at > 0 else -1
        if end > 0 and event.find(b"{", at + _USAGE_MEMBER_BYTES, end) >= 0:
            end = object_end(event, at + _USAGE_MEMBER_BYTES - 1)
        if end <= 0:
            self._deltas += 1
            return event
        if self._single:
            self._running = event
        else:
            found = _INDEX.search(event)
            self._running_by_choice[int(found[1]) if found else 0] = event
        return event[:at] + event[end:] if self._strip else event

    def _sum_choices(self) -> TokenCounts:
        """Adds up usage that is told by choice: prompts count once, however many choices each has."""
        prompts: dict[int, int] = {}
        completion = 0
        exact = not self._lost
        for index, event in self._running_by_choice.items():
            counts = counts_of(_usage_of(event))
            if counts is None or counts.prompt is None or counts.completion is None:
                exact = False
                continue
            prompts[index // self._asked.choices] = counts.prompt
            completion += counts.completion
        # A prompt whose first token has not come is in nobody's sum.
        exact = exact and len(prompts) == self._asked.prompts
        return TokenCounts(sum(prompts.values()), completion, exact=exact)


class EventMeter:
    """Meters streams of named events: `/v1/responses` and `/v1/messages`. Bytes pass untouched.

    Both tell usage at the end, messages the prompt's at the beginning, too. What a client that leaves has
    had by then is known by the number of its deltas only.
    """

    def __init__(self) -> None:
        self.error = ""
        self.error_is_clients = False
        self.ended = False
        self._cutter = EventCutter()
        self._deltas = 0
        self._prompt: int | None = None
        self._last: TokenCounts | None = None

    def feed(self, piece: bytes) -> bytes:
        """Takes bytes of the engine and returns them."""
        try:
            events = self._cutter.feed(piece)
        except EventTooLong:
            return piece
        for event in events:
            if event.find(b'.delta"') >= 0 or event.find(b'"content_block_delta"') >= 0:
                self._deltas += 1
            elif (
                event.find(_USAGE_KEY) >= 0
                or event.find(b'"error"') >= 0
                or event.find(b"[DONE]") >= 0
                or event.find(b"message_stop") >= 0
            ):
                self._read(event)
        return piece

    def finish(self) -> bytes:
        """Returns nothing: nothing is held back."""
        return b""

    def counts(self) -> TokenCounts:
        """Returns the engine's own count, else the prompt's where it was told, and the number of deltas."""
        return self._last or TokenCounts(prompt=self._prompt, completion=self._deltas)

    def _read(self, event: bytes) -> None:
        document = _document(event)
        if document is None:
            self.ended = self.ended or data_of(event) == DONE
            return
        kind = document.get("type")
        message = document.get("message")
        if kind == "message_start" and isinstance(message, dict):
            first = counts_of(message.get("usage"))
            self._prompt = first.prompt if first else None
        elif kind == "message_delta":
            self._last = counts_of(document.get("usage")) or self._last
        elif kind == "message_stop":
            self.ended = True
        elif kind == "error" or (kind is None and "error" in document):
            self.error = self.error or message_of_error(document.get("error") or document)
            self.error_is_clients = is_clients_error(document.get("error"))
        elif kind in _RESPONSE_ENDS:
            self._end_response(kind, document.get("response"))

    def _end_response(self, kind: str, response: object) -> None:
        if not isinstance(response, dict):
            return
        self.ended = True
        self._last = counts_of(response.get("usage")) or self._last
        if kind == "response.failed":
            self.error = self.error or message_of_error(response.get("error"))


_RESPONSE_ENDS = frozenset(
    {"response.completed", "response.incomplete", "response.failed", "response.cancelled"}
)


def _document(event: bytes) -> dict[str, Any] | None:
    """Returns what `document_of` does; an event of one line, as nearly all are, is not cut up for it."""
    if event.startswith(_DATA) and event.find(b"\n") == len(event) - 2 and event.find(b"\r") < 0:
        try:
            document = orjson.loads(event[_DATA_BYTES:])
        except orjson.JSONDecodeError:
            return None
        return document if isinstance(document, dict) else None
    return document_of(event)


def _usage_of(event: bytes) -> object:
    document = _document(event)
    return document.get("usage") if document else None


def _with_fingerprint(event: bytes, usage_chunk: bytes) -> bytes:
    """Gives a chunk the fingerprint that the usage chunk has in its place."""
    if usage_chunk.find(_FINGERPRINT_KEY) < 0:
        return event
    found = _FINGERPRINT.search(usage_chunk)
    end = event.rfind(b"}")
    if found is None or end < 0 or _FINGERPRINT.search(event):
        return event
    return event[:end] + found[0] + event[end:]


def message_of_error(error: object) -> str:
    """Returns the text of an error event, shortened; never empty."""
    if isinstance(error, dict):
        error = error.get("message") or error.get("type")
    return str(error or "the engine reported an error")[:256]


def _is_finish(choices: object) -> bool:
    first = choices[0] if isinstance(choices, list) else None
    return isinstance(first, dict) and first.get("finish_reason") is not None


def is_clients_error(error: object) -> bool:
    """Tells whether an error event speaks of the request: whether its code is that of a 4xx."""
    code = error.get("code") if isinstance(error, dict) else None
    return isinstance(code, int) and 400 <= code < 500
