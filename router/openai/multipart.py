"""Reads what routing needs from a form with files, and renames its model without touching the rest.

In come the bytes of a `multipart/form-data` body and its content type, out come the fields `model` and
`stream` and where the former stands. The body lies in memory already, within the bound of all bodies; its
parts are found by their boundary and only the two fields are decoded, so that audio passes byte for byte.
"""

import re
from dataclasses import dataclass

from router.openai import errors
from router.openai.body import ParsedBody

# A form of speech or images has about ten fields.
_PARTS_MAX = 64
_PART_HEAD_BYTES_MAX = 8 * 1024
_FIELD_BYTES_MAX = 1024

_BOUNDARY = re.compile(r';\s*boundary=(?:"([^"]{1,200})"|([^\s;"]{1,200}))', re.IGNORECASE)
_NAME = re.compile(rb'^content-disposition:[^\r\n]*?;\s*name="([^"\r\n]*)"', re.IGNORECASE | re.MULTILINE)


@dataclass(init=False, slots=True)
class MultipartBody(ParsedBody):
    """What the router reads of a form.

    Attributes:
        model_start: Where the value of `model` begins.
        model_end: Where it ends, exclusive.
    """

    model_start: int
    model_end: int

    def __init__(self, model: str, stream: bool, *, model_start: int, model_end: int) -> None:
        ParsedBody.__init__(self, model, stream)
        self.model_start = model_start
        self.model_end = model_end

    def renamed(self, body: bytes, model: str) -> bytes:
        """Returns the form with another model name."""
        return body[: self.model_start] + model.encode() + body[self.model_end :]


def is_multipart(content_type: str) -> bool:
    """Tells whether a body is a form."""
    return content_type.partition(";")[0].strip().lower() == "multipart/form-data"


def parse_multipart(body: bytes, content_type: str) -> MultipartBody:
    """Reads model and stream.

    Raises:
        Refusal: No form, or no model in it.
    """
    found = _BOUNDARY.search(content_type)
    if found is None:
        raise errors.body_malformed("its content type names no boundary")
    delimiter = b"--" + (found[1] or found[2]).encode()
    fields: dict[bytes, tuple[int, int]] = {}
    at = body.find(delimiter)
    for _ in range(_PARTS_MAX):
        start = at + len(delimiter)
        if at < 0 or body[start : start + 2] != b"\r\n":
            break
        head_end = body.find(b"\r\n\r\n", start, start + _PART_HEAD_BYTES_MAX)
        at = body.find(b"\r\n" + delimiter, start)
        if head_end < 0 or at < 0:
            raise errors.body_malformed("a part of the form does not end")
        name = _NAME.search(body, start + 2, head_end)
        if name is not None and at - head_end - 4 <= _FIELD_BYTES_MAX:
            fields.setdefault(name[1], (head_end + 4, at))
        at += 2
    model = _text(body, fields, b"model")
    if not model:
        raise errors.model_missing()
    start, end = fields[b"model"]
    stream = _text(body, fields, b"stream").strip().lower() in ("true", "1")
    return MultipartBody(model, stream, model_start=start, model_end=end)


def _text(body: bytes, fields: dict[bytes, tuple[int, int]], name: bytes) -> str:
    span = fields.get(name)
    if span is None:
        return ""
    try:
        return body[span[0] : span[1]].decode()
    except UnicodeDecodeError as error:
        raise errors.body_malformed(f"the field `{name.decode()}` is not UTF-8") from error
