"""Policies in files: `rollout`, `autoscale` and `routing`, from plain values to the contract's messages.

In come objects as JSON and YAML have them, out come messages; times are numbers of seconds in fields that end
in `_seconds`. What is wrong is told by path. Which values go together is the server's to judge.
"""

import difflib
import math
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from millrace.core.v1 import policy_pb2

M = TypeVar("M", bound=Message)

Wrong = Callable[[str, str], None]
"""Takes a path and what is wrong there."""

KINDS: dict[str, type[Message]] = {
    "rollout": policy_pb2.Rollout,
    "autoscale": policy_pb2.Autoscale,
    "routing": policy_pb2.Routing,
}
"""Fields of a model's entry that hold policies."""

_SECONDS = "_seconds"
_DURATION = "google.protobuf.Duration"
_DAY_SECONDS = 86_400
_INT32_MAX = 2**31 - 1


def read_policy(value: Any, kind: type[M], path: str, wrong: Wrong) -> M:
    """Converts an object; what cannot be converted is told and left out.

    Args:
        value: As the file has it.
        kind: Message to make.
        path: Where it stands in the file.
        wrong: Takes what is wrong.
    """
    message = kind()
    if not isinstance(value, dict):
        wrong(path, "has to be an object")
        return message
    fields = {_name(field): field for field in kind.DESCRIPTOR.fields}
    for name, given in value.items():
        field = fields.get(name)
        if field is None:
            close = difflib.get_close_matches(str(name), fields, n=1)
            hint = f"did you mean `{close[0]}`?" if close else f"known are {', '.join(fields)}"
            wrong(f"{path}.{name}", f"unknown field, {hint}")
        elif given is not None:
            _fill(message, field, given, f"{path}.{name}", wrong)
    return message


def _name(field: Any) -> str:
    return field.name + _SECONDS if _is_duration(field) else str(field.name)


def _is_duration(field: Any) -> bool:
    return field.message_type is not None and field.message_type.full_name == _DURATION


def _fill(message: Any, field: Any, value: Any, path: str, wrong: Wrong) -> None:
    target = getattr(message, field.name)
    if field.message_type is None:
        _fill_scalar(message, field, value, path, wrong)
    elif _is_duration(field):
        if _is_number(value) and 0 <= value <= _DAY_SECONDS:
            target.FromTimedelta(timedelta(seconds=value))
        else:
            wrong(path, f"has to be a number of seconds up to {_DAY_SECONDS}, not `{value}`")
    elif not hasattr(target, "add"):
        # An object without fields is one that is there.
        target.SetInParent()
        target.CopyFrom(read_policy(value, type(target), path, wrong))
    elif isinstance(value, list):
        for position, each in enumerate(value):
            part = target.add()
            part.CopyFrom(read_policy(each, type(part), f"{path}[{position}]", wrong))
    else:
        wrong(path, "has to be an array")


def _fill_scalar(message: Any, field: Any, value: Any, path: str, wrong: Wrong) -> None:
    if field.type == FieldDescriptor.TYPE_STRING:
        fits, expected = isinstance(value, str), "a text (put it in quotes)"
    elif field.type == FieldDescriptor.TYPE_BOOL:
        fits, expected = isinstance(value, bool), "true or false"
    elif field.type == FieldDescriptor.TYPE_DOUBLE:
        fits, expected = _is_number(value), "a number"
    else:
        whole = isinstance(value, int) and not isinstance(value, bool)
        fits, expected = whole and 0 <= value <= _INT32_MAX, "a whole number of at least 0"
    if fits:
        setattr(message, field.name, value)
    else:
        wrong(path, f"has to be {expected}, not `{value}`")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
