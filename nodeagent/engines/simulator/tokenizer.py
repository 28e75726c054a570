"""A pseudo tokenizer: deterministic, reversible, without a vocabulary file.

In: text or chat messages. Out: token ids, and text again from ids.
The text is cut from the left into pieces of at most five printable ASCII characters (with one
space before them), runs of up to six spaces, up to two other characters, or single control
characters: English comes to about four characters a token. The id of a piece is its UTF-8 bytes
read as a big-endian number: at most six bytes, so below 2**48 and safe in JSON, the same in every
process (replicas agree on prefix hashes), and decodable without a table. Every chat message is
cut for itself between special tokens, so that the answer of one turn, sent back in the next one,
has the very ids that were generated: prefix caching works across turns.
Must not: keep state, apart from a bounded memory of piece ids.
"""

import functools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

_PIECE = re.compile(r" ?[\x21-\x7e]{1,5}| {2,6}|[\x80-\uffff]{1,2}|.", re.DOTALL)
_PIECE_ID_LIMIT = 2**48
_SPECIAL_BASE = 2**52

MAX_CHARACTERS_PER_TOKEN = 6
MESSAGE_START = _SPECIAL_BASE + 1
MESSAGE_END = _SPECIAL_BASE + 2
_SPECIAL_TEXT = {MESSAGE_START: "<|im_start|>", MESSAGE_END: "<|im_end|>"}

# The echo repeats the message in circles, so its first kilobyte is enough to tell messages apart.
_ECHO_CHARACTERS = 1024
# An answer is recognised in a prompt from this much of it on, about a token; less is taken for prompt.
_REPEAT_CHARACTERS = 4
_ECHO_FALLBACK = "the simulator answers"


@functools.lru_cache(maxsize=65_536)  # some 10 MB at most; words repeat
def _piece_id(piece: str) -> int:
    return int.from_bytes(piece.encode("utf-8", "surrogatepass"), "big")


def encode(text: str) -> list[int]:
    """The token ids of a text."""
    return [_piece_id(piece) for piece in _PIECE.findall(text)]


def piece(token_id: int) -> str:
    """The text of one id; ids that no text has come out as the replacement character."""
    special = _SPECIAL_TEXT.get(token_id)
    if special is not None:
        return special
    if not 0 <= token_id < _PIECE_ID_LIMIT:
        return "\ufffd"
    length_bytes = max(1, (token_id.bit_length() + 7) // 8)
    raw = token_id.to_bytes(length_bytes, "big")
    return raw.decode("utf-8", "replace")


def decode(token_ids: Iterable[int]) -> str:
    """The text of several ids, the inverse of `encode`."""
    return "".join(piece(token_id) for token_id in token_ids)


def content_text(content: Any) -> str:
    """The text of a message's content: a string, a list of text parts, or nothing.

    Raises:
        TypeError: A part is not text; the simulated model reads nothing else.
    """
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise TypeError("content must be a string or a list of parts")
    texts = []
    for part in content:
        text = part.get("text") if isinstance(part, dict) else part
        if not isinstance(text, str):
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise TypeError(f"the model is not a multimodal model: part of type {kind!r}")
        texts.append(text)
    return "\n".join(texts)


def _message_text(message: Mapping[str, Any]) -> str:
    text = content_text(message.get("content"))
    if message.get("tool_calls"):
        text += json.dumps(message["tool_calls"], sort_keys=True)
    return text


def render_chat(
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Any = None,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
) -> list[int]:
    """The prompt ids of a chat, in the manner of a ChatML template.

    Args:
        messages: Messages with a string `role` each.
        tools: Tool definitions, rendered as a first message of their own.
        add_generation_prompt: Whether the assistant's turn is opened at the end.
        continue_final_message: Whether the last message is left open, to be written on.

    Raises:
        TypeError: A message's content is not text.
    """
    newline = encode("\n")
    token_ids: list[int] = []
    texts = [(str(message["role"]), _message_text(message)) for message in messages]
    if tools:
        texts.insert(0, ("tools", json.dumps(tools, sort_keys=True)))
    for role, text in texts:
        token_ids.append(MESSAGE_START)
        token_ids += encode(f"{role}\n")
        token_ids += encode(text)
        token_ids.append(MESSAGE_END)
        token_ids += newline
    if continue_final_message:
        return token_ids[: -1 - len(newline)]
    if add_generation_prompt:
        token_ids.append(MESSAGE_START)
        token_ids += encode("assistant\n")
    return token_ids


def echo_behind(text: str) -> tuple["Echo", int]:
    """The answer to a text completion, and how many of its tokens the prompt holds already.

    A prompt that is another prompt with the beginning of its own answer behind it gets the rest of that
    answer, as a model would give it. Among several such readings the one with the shortest prompt counts.
    """
    begin = len(text) - len(text.lstrip())
    first = text[begin : begin + _REPEAT_CHARACTERS]
    at = text.find(first, begin + 1, begin + _ECHO_CHARACTERS) if len(first) == _REPEAT_CHARACTERS else -1
    while at >= 0:
        echo = Echo(text[:at])
        offset = echo.offset_behind(text[at:])
        if offset:
            return echo, offset
        at = text.find(first, at + 1, begin + _ECHO_CHARACTERS)
    return Echo(text), 0


class Echo:
    """An endless deterministic answer: the words of a text, round and round.

    `encode` of the answer's text gives exactly the ids that `token_id` gave.
    """

    def __init__(self, text: str) -> None:
        words = " ".join(text[:_ECHO_CHARACTERS].split()) or _ECHO_FALLBACK
        self._first = encode(words)
        self._again = encode(" " + words)

    def token_id(self, index: int) -> int:
        """The id of the output token at this index, counted from 0."""
        if index < len(self._first):
            return self._first[index]
        return self._again[(index - len(self._first)) % len(self._again)]

    def offset_behind(self, text: str) -> int:
        """How many of its tokens make up a text exactly; 0 for a text that it does not begin with."""
        count, length = 0, 0
        while length < len(text):
            written = piece(self.token_id(count))
            if not text.startswith(written, length):
                return 0
            length += len(written)
            count += 1
        return count

    def text(self, start: int, stop: int) -> str:
        """The text of the output tokens from `start` up to, not including, `stop`."""
        return decode(self.token_id(index) for index in range(start, stop))
