"""One stream for the client out of the answers of several engines.

    engine 1: role  M  illrace  t|          (dies)
    engine 2:                     role  urn  s  finish  usage  [DONE]
    client:   role  M  illrace  t urn  s  finish  usage  [DONE]

In come the bytes of each answer, one after the other, out go whole events: those of the first answer as
they came, those of a later one with the first one's id, time and model, its usage added up, without a
second role. What an engine had begun to write when it died never reaches the client, and neither does its
error event while there is hope.

Where to go on: behind the last text that does not end in white space. Chat templates may trim a message,
and white space belongs to the token after it, so that the second engine would read other tokens than the
first one wrote. It writes that white space again; as far as it is the same it is swallowed. Nothing here
decides on attempts.
"""

from collections.abc import Mapping
from typing import Any

import orjson

from router.continuation.request import continued_body, tokens_max
from router.metering.stream import CompletionMeter, is_clients_error, message_of_error
from router.metering.usage import TokenCounts
from router.openai.events import DONE, EventCutter, EventTooLong, data_of, document_of

# Each is a prompt computed anew; engines that die under one stream three times die of it.
CONTINUATIONS_MAX = 2
# Longer answers are not continued: the text is kept in memory until the stream ends.
TEXT_CHARACTERS_MAX = 1_000_000

_DONE_EVENT = b"data: [DONE]\n\n"


class ContinuedStream:
    """The client's stream; a `router.metering.stream.Meter` over the one that sees the joined stream.

    Attributes:
        lost: Why the stream cannot be continued any more; empty while it can.
        failure: What the engine at work said in an error event; empty for none.
        continuations: How often another engine has been asked to go on.
    """

    def __init__(self, document: Mapping[str, Any], meter: CompletionMeter) -> None:
        """Takes the client's request, without an obstacle, and what meters the joined stream."""
        self.lost = ""
        self.failure = ""
        self.continuations = 0
        self.ended = False
        self._document = document
        self._meter = meter
        self._cutter = EventCutter()
        self._first: dict[str, Any] = {}
        self._later = False
        self._role_sent = False
        self._finished = False
        self._usage_sent = False
        self._withheld = b""
        # All that was sent, by chunk; its length, and how much of it and of its tokens can be built upon.
        self._texts: list[str] = []
        self._length = 0
        self._tokens = 0
        self._solid_length = 0
        self._solid_tokens = 0
        # Of earlier answers.
        self._base_tokens = 0
        self._prompt_tokens: int | None = None
        self._again = ""

    @property
    def error(self) -> str:
        """What an engine said in an error event that went to the client; empty for none."""
        return self._meter.error

    @property
    def error_is_clients(self) -> bool:
        """That error speaks of the request."""
        return self._meter.error_is_clients

    def counts(self) -> TokenCounts:
        """Returns what is known of the usage of the joined stream."""
        return self._meter.counts()

    def interrupt(self) -> bool:
        """Notes that an answer ended before the stream did; tells whether another engine may go on."""
        if self.lost or self.continuations >= CONTINUATIONS_MAX:
            return False
        self.continuations += 1
        return True

    def feed(self, piece: bytes) -> bytes:
        """Takes bytes of the engine at work and returns whole events for the client."""
        try:
            events = self._cutter.feed(piece)
        except EventTooLong as error:
            self.lost = "an event is too long"
            return self._meter.feed(error.text)
        made = [self._meter.feed(made) for event in events if not self.ended and (made := self._event(event))]
        return b"".join(made)

    def finish(self) -> bytes:
        """Returns nothing: what is incomplete is not sent."""
        return b""

    def give_up(self) -> bytes:
        """Returns what was held back while there was hope; the stream ends here."""
        withheld, self._withheld = self._withheld, b""
        self.ended = withheld.endswith(_DONE_EVENT)
        return self._meter.feed(withheld) + self._meter.finish()

    def close(self) -> bytes | None:
        """Ends a stream that lacks nothing but its end: all text is there, usage or [DONE] is not.

        Returns:
            What is left to send; None where text is missing.
        """
        limit = tokens_max(self._document)
        if not self._finished and (limit is None or self._tokens < limit or not self._first):
            return None
        events = []
        if not self._finished:
            events.append(self._made([self._choice("length")], self._usage()))
        if not self._usage_sent:
            events.append(self._made([], self._usage()))
        self.ended = True
        return b"".join(map(self._meter.feed, [*events, _DONE_EVENT])) + self._meter.finish()

    def next_body(self) -> bytes:
        """Returns the request for the next engine, and gets ready for its answer."""
        self._cutter = EventCutter()
        self._withheld, self.failure = b"", ""
        self._later = True
        text = "".join(self._texts)
        self._again = text[self._solid_length :]
        self._base_tokens = self._tokens = self._solid_tokens
        return continued_body(self._document, text[: self._solid_length], self._solid_tokens)

    def _event(self, event: bytes) -> bytes:
        if data_of(event) == DONE:
            self.ended = not self.failure
            return event if self.ended else self._withhold(event)
        document = document_of(event)
        if document is None:
            # Comments pass; an event that somebody closed although it was incomplete does not.
            return event if event.startswith(b":") else b""
        error = document.get("error")
        if error and not is_clients_error(error):
            self.failure = self.failure or message_of_error(error)
            return self._withhold(event)
        choices = document.get("choices")
        if not isinstance(choices, list) or error:
            return event
        return self._joined(document, choices) if self._later else self._begun(event, document, choices)

    def _withhold(self, event: bytes) -> bytes:
        self._withheld += event
        return b""

    def _begun(self, event: bytes, document: dict[str, Any], choices: list[Any]) -> bytes:
        """Takes note of an event of the first answer, which goes on as it is."""
        self._note_envelope(document)
        if choices:
            self._note_text(self._read_text(choices[0]), document.get("usage"))
        else:
            self._usage_sent = True
        return event

    def _joined(self, document: dict[str, Any], choices: list[Any]) -> bytes:
        """Makes an event of a later answer one of the joined stream; empty where it has no place there."""
        self._note_envelope(document)
        document |= self._first
        usage = document.get("usage")
        if isinstance(usage, dict):
            self._add_up(usage)
        if not choices:
            self._usage_sent = True
            return _dump(document)
        choice = choices[0]
        delta = choice.get("delta") if isinstance(choice, dict) else None
        begins = not self._role_sent
        if isinstance(delta, dict) and not begins:
            delta.pop("role", None)
        text = self._unsaid(self._read_text(choice))
        self._note_text(text, usage)
        if isinstance(delta, dict) and "content" in delta:
            delta["content"] = text
        elif isinstance(choice, dict) and "text" in choice:
            choice["text"] = text
        if not text and not self._finished and not begins:
            return b""
        return _dump(document)

    def _note_envelope(self, document: dict[str, Any]) -> None:
        if not self._first:
            self._first = {name: document[name] for name in ("id", "created", "model") if name in document}
        usage = document.get("usage")
        if self._prompt_tokens is None and isinstance(usage, dict):
            self._prompt_tokens = usage.get("prompt_tokens")

    def _read_text(self, choice: Any) -> str:
        """Returns a choice's text, and notices what cannot be continued and what is complete."""
        if not isinstance(choice, dict):
            self.lost = "a choice has another shape"
            return ""
        self._finished = self._finished or choice.get("finish_reason") is not None
        delta = choice.get("delta")
        if isinstance(delta, dict):
            if "role" in delta:
                self._role_sent = True
            if any(value and name not in ("role", "content") for name, value in delta.items()):
                self.lost = "the answer holds more than text"
            return delta.get("content") or ""
        self._role_sent = True
        return choice.get("text") or ""

    def _note_text(self, text: str, usage: Any) -> None:
        before = self._tokens
        told = usage.get("completion_tokens") if isinstance(usage, dict) else None
        self._tokens = told if isinstance(told, int) else before + bool(text)
        if not text:
            return
        self._texts.append(text)
        self._length += len(text)
        if self._length > TEXT_CHARACTERS_MAX:
            self.lost = "the answer is too long"
        kept = len(text.rstrip())
        if kept == len(text):
            self._solid_length, self._solid_tokens = self._length, self._tokens
        elif kept:
            # The white space of this token comes again as a token of its own, which takes this one's count.
            self._solid_length, self._solid_tokens = self._length - len(text) + kept, before

    def _unsaid(self, text: str) -> str:
        """Returns a text without the beginning that the client has already."""
        again = self._again
        if not again or not text:
            return text
        if text.startswith(again):
            self._again = ""
            return text[len(again) :]
        if again.startswith(text):
            self._again = again[len(text) :]
            return ""
        self._again = ""
        return text

    def _add_up(self, usage: dict[str, Any]) -> None:
        """Makes a later answer's usage the joined stream's: the prompt once, all that was produced."""
        completion = usage.get("completion_tokens")
        if isinstance(completion, int):
            usage["completion_tokens"] = completion + self._base_tokens
        if isinstance(self._prompt_tokens, int):
            usage["prompt_tokens"] = self._prompt_tokens
            usage["total_tokens"] = self._prompt_tokens + (usage.get("completion_tokens") or 0)
        if self._base_tokens:
            # Cached tokens of the longer prompt say nothing of the client's.
            usage.pop("prompt_tokens_details", None)

    def _usage(self) -> dict[str, int]:
        prompt = self._prompt_tokens or 0
        return {
            "prompt_tokens": prompt,
            "total_tokens": prompt + self._tokens,
            "completion_tokens": self._tokens,
        }

    def _choice(self, finish_reason: str) -> dict[str, Any]:
        text = {"delta": {"content": ""}} if "messages" in self._document else {"text": ""}
        return {"index": 0, **text, "logprobs": None, "finish_reason": finish_reason}

    def _made(self, choices: list[dict[str, Any]], usage: dict[str, int]) -> bytes:
        kind = "chat.completion.chunk" if "messages" in self._document else "text_completion"
        return _dump({**self._first, "object": kind, "choices": choices, "usage": usage})


def _dump(document: dict[str, Any]) -> bytes:
    return b"data: " + orjson.dumps(document) + b"\n\n"
