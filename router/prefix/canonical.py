"""Turns a parsed request into the bytes whose prefix an engine would have cached.

In comes the JSON document of a request, out come bytes in which equal prompts begin equally, whatever the
order of names or the spaces of their JSON. Tools come first, as chat templates put them. This is no chat
template: it only has to be equal where the engine's tokens are equal. Pure.
"""

from array import array
from collections.abc import Iterable, Mapping
from typing import Any

import orjson

# Between messages and between their parts; JSON text holds them only escaped, so content rarely does.
_MESSAGE = "\x1e"
_PART = "\x1f"


def canonical_prompt(document: Mapping[str, Any]) -> bytes:
    """Returns the prompt's bytes; empty for a request without one.

    Token ids become four bytes each, since text counts as four bytes a token too.
    """
    messages = document.get("messages")
    if isinstance(messages, list):
        return "".join(_chat(messages, document.get("tools"))).encode(errors="surrogatepass")
    prompt = document.get("prompt")
    return _plain(document.get("input") if prompt is None else prompt)


def _chat(messages: Iterable[Any], tools: Any) -> Iterable[str]:
    if tools:
        yield _json(tools)
    for message in messages:
        if not isinstance(message, dict):
            yield _MESSAGE + _json(message)
            continue
        yield _MESSAGE
        role = message.get("role")
        if isinstance(role, str):
            yield role
        yield _PART
        content = message.get("content")
        if isinstance(content, str):
            yield content
        elif isinstance(content, list):
            yield from map(_part, content)
        calls = message.get("tool_calls")
        if calls:
            yield _PART + _json(calls)


def _part(part: Any) -> str:
    if isinstance(part, dict) and isinstance(part.get("text"), str):
        return str(part["text"])
    return _PART + _json(part)


def _plain(prompt: Any) -> bytes:
    if isinstance(prompt, str):
        return prompt.encode(errors="surrogatepass")
    if isinstance(prompt, list) and prompt:
        if all(isinstance(each, int) for each in prompt):
            return _token_bytes(prompt)
        # Several prompts in one request: the engine caches each, and the first says most of where to.
        first = prompt[0]
        if isinstance(first, str):
            return first.encode(errors="surrogatepass")
        if isinstance(first, list) and all(isinstance(each, int) for each in first):
            return _token_bytes(first)
    return b""


def _token_bytes(tokens: list[int]) -> bytes:
    try:
        return array("I", tokens).tobytes()
    except OverflowError:
        # No token id is negative or beyond 32 bits; the engine will say so.
        return b""


def _json(value: Any) -> str:
    try:
        return orjson.dumps(value, option=orjson.OPT_SORT_KEYS).decode()
    except orjson.JSONEncodeError:
        # It can be read but not written: nested too deeply. Such a request is routed by what else it has.
        return ""
