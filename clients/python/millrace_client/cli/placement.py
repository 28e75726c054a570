"""Placement in files, labels and taints on the command line, as the contract has them.

In come plain values as a user wrote them, out come messages, or what is wrong with path and remedy.
Whether nodes, devices and labels exist is the server's to judge.
"""

import difflib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from millrace_client.errors import InvalidArgument

if TYPE_CHECKING:
    from millrace.core.v1.policy_pb2 import Placement, Taint

FIELDS = ("node_selector", "tolerations", "device_pins")
EFFECTS = ("no_schedule", "no_execute")


def placement_message(placement: dict[str, Any]) -> "Placement":
    """Converts a placement whose shape was checked."""
    from millrace.core.v1.policy_pb2 import DevicePin, Placement, Toleration

    return Placement(
        node_selector=placement.get("node_selector") or {},
        tolerations=[
            Toleration(key=each["key"], value=each.get("value") or "")
            for each in placement.get("tolerations") or ()
        ],
        device_pins=[
            DevicePin(node=each["node"], device_ids=each["device_ids"])
            for each in placement.get("device_pins") or ()
        ],
    )


def placement_problems(placement: dict[str, Any], path: str) -> Iterator[tuple[str, str]]:
    """Yields the field and what is wrong with it, for everything that is wrong with the shape."""
    yield from _unknown(placement, FIELDS, path)
    selector = placement.get("node_selector")
    if selector is not None and not isinstance(selector, dict):
        yield f"{path}.node_selector", "has to be an object of labels: {zone: north}"
    for key, value in selector.items() if isinstance(selector, dict) else ():
        if not isinstance(value, str):
            yield f"{path}.node_selector.{key}", "has to be a text (put it in quotes)"
    for index, each in _entries(placement.get("tolerations")):
        where = f"{path}.tolerations[{index}]"
        if not isinstance(each, dict) or not isinstance(each.get("key"), str):
            yield where, "has to be an object with `key`, and perhaps `value`"
            continue
        yield from _unknown(each, ("key", "value"), where)
        if not isinstance(each.get("value", ""), str | None):
            yield f"{where}.value", "has to be a text (put it in quotes)"
    for index, each in _entries(placement.get("device_pins")):
        where = f"{path}.device_pins[{index}]"
        if not isinstance(each, dict) or not isinstance(each.get("node"), str):
            yield where, "has to be an object with `node` and `device_ids`"
            continue
        yield from _unknown(each, ("node", "device_ids"), where)
        devices = each.get("device_ids")
        if not isinstance(devices, list) or not all(isinstance(device, str) for device in devices):
            yield (
                f"{where}.device_ids",
                "has to be a list of device ids (`millrace nodes get NODE` shows them)",
            )
    for field in ("tolerations", "device_pins"):
        if placement.get(field) is not None and not isinstance(placement[field], list):
            yield f"{path}.{field}", "has to be a list"


def parse_labels(texts: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Reads `key=value` and `key-`.

    Returns:
        Labels to set, keys to take away.

    Raises:
        InvalidArgument: A text is neither.
    """
    wanted: dict[str, str] = {}
    gone: list[str] = []
    for text in texts:
        key, equals, value = text.partition("=")
        if equals and key:
            wanted[key] = value
        elif text.endswith("-") and text != "-":
            gone.append(text[:-1])
        else:
            raise InvalidArgument(
                f"`{text}` is no change of a label: write KEY=VALUE, or KEY- to take it away"
            )
    return wanted, gone


def parse_taints(texts: Sequence[str]) -> tuple[list["Taint"], list[str]]:
    """Reads `key[=value]:effect` and `key-`.

    Returns:
        Taints to set, keys to take away.

    Raises:
        InvalidArgument: A text is neither.
    """
    from millrace.core.v1 import types_pb2
    from millrace.core.v1.policy_pb2 import Taint

    effects = {
        "no_schedule": types_pb2.TAINT_EFFECT_NO_SCHEDULE,
        "no_execute": types_pb2.TAINT_EFFECT_NO_EXECUTE,
    }
    wanted: list[Taint] = []
    gone: list[str] = []
    for text in texts:
        label, colon, effect = text.rpartition(":")
        spelled = effect.lower().replace("-", "_")
        key, _, value = label.partition("=")
        if colon and key and spelled in effects:
            wanted.append(Taint(key=key, value=value, effect=effects[spelled]))
        elif text.endswith("-") and text != "-" and not colon:
            gone.append(text[:-1])
        else:
            raise InvalidArgument(
                f"`{text}` is no change of a taint: write KEY=VALUE:no_schedule or KEY=VALUE:no_execute, or "
                "KEY- to take it away"
            )
    return wanted, gone


def _entries(value: Any) -> Iterator[tuple[int, Any]]:
    if isinstance(value, list):
        yield from enumerate(value)


def _unknown(value: dict[str, Any], known: Sequence[str], path: str) -> Iterator[tuple[str, str]]:
    for field in value:
        if field not in known:
            close = difflib.get_close_matches(field, known, n=1)
            hint = f"did you mean `{close[0]}`?" if close else f"known are {', '.join(known)}"
            yield f"{path}.{field}", f"unknown field, {hint}"
