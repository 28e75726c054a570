"""Turns a parsed request into the bytes whose prefix an engine would have cached.

In comes the JSON document of a request, out come bytes in which equal prompts begin equally, whatever the
order of names or the spaces of their JSON. Tools come first, as chat templates put them. This is no chat
template: it only has to be equal where the engine's tokens are equal. Only the beginning is made, as far as
its reader wants it, so that a body of megabytes does not hold up the event loop. Pure.
"""

from array import array
from typing import Any

import orjson
from xxhash import xxh64_hexdigest

# Between messages and between their parts; JSON text holds them only escaped, so content rarely does.
_MESSAGE = "\x1e"
_PART = "\x1f"
_BYTES_PER_TOKEN_ID = 4
# Images and recordings come as long texts inside of parts. They stand here for what they are, not for how
# many tokens they take, and a hash does that.
_LONG_CHARACTERS = 512
_PART_DEPTH = 3


def canonical_prompt(document: dict[str, Any], *, bytes_max: int) -> tuple[bytes, int]:
    """Returns the beginning of the prompt's bytes and the length of all of them; nothing without a prompt.

    Token ids become four bytes each, since text counts as four bytes a token too.

    Args:
        document: Parsed body.
        bytes_max: Bytes that are wanted; of a longer prompt at least so many come, and at most four times as
            many. Its length is worked out from them then.
    """
    messages = document.get("messages")
    if isinstance(messages, list):
        tools = document.get("tools")
        pieces = [_json(tools)] if tools else []
        for message in messages:
            _add_message(pieces, message)
        return _bytes(pieces, bytes_max)
    prompt = document.get("prompt")
    return _plain(document.get("input") if prompt is None else prompt, bytes_max)


def _bytes(pieces: list[str], bytes_max: int) -> tuple[bytes, int]:
    characters = 0
    for each in pieces:
        characters += len(each)
    if characters <= bytes_max:
        text = "".join(pieces).encode("utf-8", "surrogatepass")
        return text, len(text)
    kept, room = [], bytes_max
    for piece in pieces:
        kept.append(piece[:room])
        room -= len(kept[-1])
        if not room:
            break
    text = "".join(kept).encode("utf-8", "surrogatepass")
    # As many bytes a character as in the beginning.
    return text, len(text) * characters // bytes_max


def _add_message(pieces: list[str], message: Any) -> None:
    if not isinstance(message, dict):
        pieces.append(_MESSAGE)
        pieces.append(_json(message))
        return
    role, content, calls = message.get("role"), message.get("content"), message.get("tool_calls")
    pieces.append(_MESSAGE)
    if isinstance(role, str):
        pieces.append(role)
    pieces.append(_PART)
    if isinstance(content, str):
        pieces.append(content)
    elif isinstance(content, list):
        pieces.extend([_part(each) for each in content])
    if calls:
        pieces.append(_PART)
        pieces.append(_json(calls))


def _part(part: Any) -> str:
    if isinstance(part, dict) and isinstance(part.get("text"), str):
        return str(part["text"])
    return _PART + _json(_folded(part, _PART_DEPTH))


def _folded(value: Any, depth: int) -> Any:
    """Replaces long texts by their hashes, down to where a part's data may stand."""
    if isinstance(value, str) and len(value) > _LONG_CHARACTERS:
        return xxh64_hexdigest(value.encode("utf-8", "surrogatepass"), 0)
    if isinstance(value, dict) and depth:
        return {name: _folded(each, depth - 1) for name, each in value.items()}
    return value


def _plain(prompt: Any, bytes_max: int) -> tuple[bytes, int]:
    if isinstance(prompt, str):
        return _bytes([prompt], bytes_max)
    if isinstance(prompt, list) and prompt:
        first = prompt[0]
        if isinstance(first, int):
            return _token_bytes(prompt, bytes_max)
        # Several prompts in one request: the engine caches each, and the first says most of where to.
        if isinstance(first, str):
            return _bytes([first], bytes_max)
        if isinstance(first, list):
            return _token_bytes(first, bytes_max)
    return b"", 0


def _token_bytes(tokens: list[Any], bytes_max: int) -> tuple[bytes, int]:
    try:
        beginning = array("I", tokens[: -(-bytes_max // _BYTES_PER_TOKEN_ID)]).tobytes()
    except (OverflowError, TypeError):
        # No token id is negative, beyond 32 bits or anything but a whole number; the engine will say so.
        return b"", 0
    return beginning, len(tokens) * _BYTES_PER_TOKEN_ID


def _json(value: Any) -> str:
    try:
        return orjson.dumps(value, option=orjson.OPT_SORT_KEYS).decode()
    except orjson.JSONEncodeError:
        # It can be read but not written: nested too deeply. Such a request is routed by what else it has.
        return ""
