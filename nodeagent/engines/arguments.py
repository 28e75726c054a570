"""Command-line arguments by name: what was worked out, then what the user sets over it.

In: computed arguments and the free-form `extra_args` of a deployment. Out: argv words. Keys are checked
against a pattern and a list of arguments that belong to the agent, so that a deployment cannot move an
engine to another port or put a secret where every user of the machine can read it.
"""

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from google.protobuf import json_format
from google.protobuf.struct_pb2 import Struct

from nodeagent.engines.base import CannotStart

# A flag's value: True is a bare flag, False its `--no-` form, None leaves the flag out.
ArgumentValue = str | bool | list[str] | None

_KEY = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")
# Argument lists beyond this are a mistake; the kernel's own limit is far above.
VALUE_LENGTH_MAX = 16_384

# The agent's own: where the engine listens, what it is called, and what would put secrets into argv or
# read them from files of the caller's choice.
RESERVED_KEYS = frozenset(
    {
        "api-key",
        "api-server-count",
        "config",
        "grpc",
        "grpc-port",
        "headless",
        "host",
        "middleware",
        "model",
        "port",
        "root-path",
        "served-model-name",
        "ssl-ca-certs",
        "ssl-certfile",
        "ssl-keyfile",
        "uds",
    }
)

# Overrides of the sizing, which the control plane has worked in before anything is launched.
SIZING_KEYS = frozenset({"sizing-overhead-bytes", "sizing-weights-bytes"})


def struct_to_dict(struct: Struct) -> dict[str, Any]:
    """Converts a protobuf Struct; whole numbers come back as integers, since JSON has only one kind."""
    return {name: _whole(value) for name, value in json_format.MessageToDict(struct).items()}


def _whole(value: Any) -> Any:
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, list):
        return [_whole(each) for each in value]
    if isinstance(value, dict):
        return {name: _whole(each) for name, each in value.items()}
    return value


def _argument(key: str, value: Any) -> ArgumentValue:
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, list):
        words = [_word(each) for each in value]
    elif isinstance(value, dict):
        words = [json.dumps(value, separators=(",", ":"), ensure_ascii=False, sort_keys=True)]
    else:
        words = [_word(value)]
    if sum(map(len, words)) > VALUE_LENGTH_MAX:
        raise CannotStart(f"extra_args.{key} is longer than {VALUE_LENGTH_MAX} characters")
    if any("\0" in word for word in words):
        raise CannotStart(f"extra_args.{key} holds a zero byte")
    return words


def _word(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, dict | list):
        return json.dumps(value, separators=(",", ":"), ensure_ascii=False, sort_keys=True)
    return str(value)


def merge_arguments(
    computed: Mapping[str, ArgumentValue],
    extra: Struct,
    *,
    reserved: Iterable[str] = RESERVED_KEYS,
    ignored: Iterable[str] = (),
) -> dict[str, ArgumentValue]:
    """Lays `extra_args` over computed arguments.

    Args:
        computed: Worked-out arguments by flag name without dashes, words joined by `-`.
        extra: The user's; `_` and `-` in keys are the same, null removes a computed argument.
        reserved: Names that only the agent sets.
        ignored: Names that mean something to another part of Millrace and nothing to the engine.

    Raises:
        CannotStart: A key is malformed or reserved, or a value is absurd.
    """
    merged = dict(computed)
    reserved, ignored = frozenset(reserved), SIZING_KEYS.union(ignored)
    # A Struct has no order of its own; a command line that differs from start to start is hard to compare.
    for key, value in sorted(struct_to_dict(extra).items()):
        name = key.replace("_", "-")
        if not _KEY.fullmatch(key):
            raise CannotStart(
                f"extra_args key {key[:80]!r} is no argument name: use lower-case letters, digits, _ and -"
            )
        if name in ignored:
            continue
        if name in reserved:
            raise CannotStart(f"extra_args.{key} is set by Millrace itself: remove it")
        merged[name] = _argument(key, value)
    return merged


def to_argv(arguments: Mapping[str, ArgumentValue]) -> tuple[str, ...]:
    """Writes arguments as argv words, in their order."""
    words: list[str] = []
    for name, value in arguments.items():
        if value is None:
            continue
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
        elif isinstance(value, str):
            words += _flag(name, [value])
        else:
            words += _flag(name, value)
    return tuple(words)


def _flag(name: str, values: list[str]) -> list[str]:
    # A value that begins with a dash would be read as a flag of its own.
    if len(values) == 1 and values[0].startswith("-"):
        return [f"--{name}={values[0]}"]
    return [f"--{name}", *values]
