"""Reads from a request body what routing needs, and renames its model without touching the rest.

In come the bytes of the body, out come `model` and `stream`, or the same bytes with another model name.
Everything else in the body is the engine's business and goes on byte for byte.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import orjson

from router.openai import errors


# With an `__init__` of its own: one that `dataclass` makes is never compiled, and every request makes one.
@dataclass(init=False, slots=True)
class ParsedBody:
    """What the router reads of a request; nobody changes it once it is made.

    Attributes:
        model: As the client named it.
        stream: True when the client asked for a stream.
        document: The whole body as parsed, for the one reading of its prompt.
    """

    model: str
    stream: bool
    document: Mapping[str, Any] = field(compare=False, repr=False)

    def __init__(self, model: str, stream: bool, document: Mapping[str, Any] | None = None) -> None:
        self.model = model
        self.stream = stream
        self.document = {} if document is None else document

    def renamed(self, body: bytes, model: str) -> bytes:
        """Returns the body with another model name.

        Raises:
            Refusal: Nested too deeply to be walked.
        """
        return rename_model(body, model)


class BareBody(ParsedBody):
    """A body that says nothing to the router, as of a request that has none."""

    def renamed(self, body: bytes, model: str) -> bytes:  # noqa: ARG002 - it names no model
        """Returns the body as it is."""
        return body


def parse_body(body: bytes) -> ParsedBody:
    """Reads model and stream.

    Raises:
        Refusal: Not a JSON object, no model, or one of the two has the wrong type.
    """
    try:
        document: Any = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise errors.body_malformed(f"it is not valid JSON ({error.msg})") from error
    if not isinstance(document, dict):
        raise errors.body_malformed("it must be a JSON object")
    model = document.get("model")
    if model is None or model == "":
        raise errors.model_missing()
    if not isinstance(model, str):
        raise errors.parameter_invalid("model", "a string")
    stream = document.get("stream")
    if stream is not None and not isinstance(stream, bool):
        raise errors.parameter_invalid("stream", "a boolean")
    return ParsedBody(model, bool(stream), document)


_SPACE = re.compile(r"[ \t\n\r]*")

# Numbers stay text: their value does not matter, and huge ones would raise.
_decoder = json.JSONDecoder(parse_int=str, parse_float=str)


def rename_model(body: bytes, model: str) -> bytes:
    """Replaces the value of the top-level `model`, leaving every other byte as it is.

    Args:
        body: A body that `parse_body` has accepted.
        model: New name.

    Raises:
        Refusal: Nested too deeply to be walked.
    """
    return replace_member(body, "model", orjson.dumps(model))


def replace_member(body: bytes, name: str, value: bytes) -> bytes:
    """Replaces the value of a top-level member, leaving every other byte as it is.

    Args:
        body: A body that `parse_body` has accepted.
        name: Of the member; a body without it is returned unchanged.
        value: New value, as JSON.

    Raises:
        Refusal: Nested too deeply to be walked.
    """
    text = body.decode()
    replacement = value.decode()
    pieces: list[str] = []
    copied = 0
    try:
        for key, start, end in _members(text):
            # A name may stand twice, and decoders differ in which one they believe.
            if key == name:
                pieces += [text[copied:start], replacement]
                copied = end
    except RecursionError as error:
        raise errors.body_malformed("it is nested too deeply") from error
    pieces.append(text[copied:])
    return "".join(pieces).encode()


def _members(text: str) -> Iterator[tuple[str, int, int]]:
    """Yields the top-level names with where their values start and end."""
    at = _skip_space(text, _skip_space(text, 0) + 1)
    while text[at] != "}":
        key, at = _decoder.raw_decode(text, at)
        start = _skip_space(text, _skip_space(text, at) + 1)
        _, end = _decoder.raw_decode(text, start)
        yield key, start, end
        at = _skip_space(text, end)
        if text[at] == ",":
            at = _skip_space(text, at + 1)


def _skip_space(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    assert found is not None
    return found.end()
