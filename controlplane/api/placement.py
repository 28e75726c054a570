"""Where replicas may run, as users and operators wrote it, checked: priority, placement, labels, taints.

In come specs, out come violations with path and remedy. `check_priority` and `check_placement` look at the
spec alone; `check_pins_known` and `check_quota` compare it with what is known of nodes and tenants.
Nothing here does I/O or decides where a replica goes.
"""

import re
from collections.abc import Callable, Mapping, Sequence

from millrace.core.v1 import deployment_pb2, node_pb2, policy_pb2, sizing_pb2, types_pb2
from millrace.state.v1 import records_pb2

from controlplane.api import limits
from controlplane.convert import desired_replicas
from core.errors import FailedPrecondition
from core.store import keys

_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9_.-]*[A-Za-z0-9])?")
_PREFIX = re.compile(r"[a-z0-9]([a-z0-9.-]*[a-z0-9])?")
_PREFIX_LENGTH_MAX = 253

Add = Callable[[str, str], None]
"""Takes a field and what is wrong with it."""


def check_priority(spec: deployment_pb2.DeploymentSpec, prefix: str, add: Add) -> None:
    """Checks the priority, where one is given."""
    if spec.HasField("priority") and not limits.PRIORITY_MIN <= spec.priority <= limits.PRIORITY_MAX:
        add(
            f"{prefix}priority",
            f"{spec.priority} is out of range; give {limits.PRIORITY_MIN} (least important) to "
            f"{limits.PRIORITY_MAX}, or leave it out for 5",
        )


def check_placement(spec: deployment_pb2.DeploymentSpec, prefix: str, add: Add) -> None:
    """Checks selector, tolerations and pins."""
    placement, field = spec.placement, f"{prefix}placement"
    check_labels(placement.node_selector, f"{field}.node_selector", add)
    if len(placement.tolerations) > limits.PLACEMENT_ENTRIES_MAX:
        add(f"{field}.tolerations", _too_many(len(placement.tolerations)))
    for index, each in enumerate(placement.tolerations[: limits.PLACEMENT_ENTRIES_MAX]):
        _check_key(each.key, f"{field}.tolerations[{index}].key", add)
        _check_value(each.value, f"{field}.tolerations[{index}].value", add)
    if placement.device_pins and spec.engine == types_pb2.ENGINE_EXTERNAL:
        add(f"{field}.device_pins", "an external engine holds no device; leave it out")
        return
    if len(placement.device_pins) > limits.REPLICAS_MAX:
        add(f"{field}.device_pins", f"has more than {limits.REPLICAS_MAX} entries, one a replica")
        return
    _check_pins(placement.device_pins, f"{field}.device_pins", add)


def _check_pins(pins: Sequence[policy_pb2.DevicePin], field: str, add: Add) -> None:
    first: dict[tuple[str, frozenset[str]], int] = {}
    for index, pin in enumerate(pins):
        path = f"{field}[{index}]"
        if not pin.node:
            add(f"{path}.node", "is empty; name the node that has the devices")
        if not pin.device_ids:
            add(f"{path}.device_ids", "is empty; name the devices of one replica")
        if len(set(pin.device_ids)) != len(pin.device_ids):
            add(f"{path}.device_ids", "names a device twice; a replica takes each device once")
        same = first.setdefault((pin.node, frozenset(pin.device_ids)), index)
        if same != index:
            add(
                path,
                f"names the same devices as {field.rpartition('.')[2]}[{same}]; pin each replica elsewhere",
            )


def check_labels(labels: Mapping[str, str], field: str, add: Add) -> None:
    """Checks labels, of nodes or asked for."""
    if len(labels) > limits.PLACEMENT_ENTRIES_MAX:
        add(field, _too_many(len(labels)))
    for key in sorted(labels)[: limits.PLACEMENT_ENTRIES_MAX]:
        _check_key(key, field, add)
        _check_value(labels[key], f"{field}.{key[:80]}", add)


def check_taints(taints: Sequence[policy_pb2.Taint], field: str, add: Add) -> None:
    """Checks a node's taints."""
    if len(taints) > limits.PLACEMENT_ENTRIES_MAX:
        add(field, _too_many(len(taints)))
    seen: set[tuple[str, int]] = set()
    for index, each in enumerate(taints[: limits.PLACEMENT_ENTRIES_MAX]):
        _check_key(each.key, f"{field}[{index}].key", add)
        _check_value(each.value, f"{field}[{index}].value", add)
        if each.effect not in {types_pb2.TAINT_EFFECT_NO_SCHEDULE, types_pb2.TAINT_EFFECT_NO_EXECUTE}:
            add(f"{field}[{index}].effect", "has to be NO_SCHEDULE or NO_EXECUTE")
        if (each.key, each.effect) in seen:
            add(f"{field}[{index}]", f"`{each.key[:80]}` stands there with the same effect already")
        seen.add((each.key, each.effect))


def check_pins_known(
    spec: deployment_pb2.DeploymentSpec,
    machines: Callable[[str], records_pb2.NodeObservationRecord | None],
    prefix: str,
    add: Add,
) -> None:
    """Checks that pinned devices exist.

    Args:
        spec: What is wanted.
        machines: What is known of a node, by its key.
        prefix: Put before field names, such as `models[0].`.
        add: Takes what is wrong.
    """
    for index, pin in enumerate(spec.placement.device_pins):
        path = f"{prefix}placement.device_pins[{index}]"
        machine = machines(keys.actual_node(pin.node))
        if machine is None:
            add(
                f"{path}.node",
                f"there is no node `{pin.node[:80]}`; `millrace nodes` lists those that there are",
            )
            continue
        _check_devices(pin, machine.inventory, f"{path}.device_ids", add)


def _check_devices(
    pin: policy_pb2.DevicePin, inventory: node_pb2.NodeInventory, field: str, add: Add
) -> None:
    known = [device.id for device in inventory.devices]
    for device in pin.device_ids:
        if device not in known:
            listed = ", ".join(f"`{each}`" for each in known[:16])
            add(field, f"node `{pin.node}` has no device `{device[:80]}`; it has {listed or 'none'}")


def check_pin_sizes(
    spec: deployment_pb2.DeploymentSpec, sizing: sizing_pb2.Sizing, prefix: str, add: Add
) -> None:
    """Checks that each pin names as many devices as a replica takes."""
    for index, pin in enumerate(spec.placement.device_pins):
        if len(pin.device_ids) != sizing.device_count:
            add(
                f"{prefix}placement.device_pins[{index}].device_ids",
                f"names {len(pin.device_ids)} device(s); a replica takes {sizing.device_count}: "
                f"{sizing.summary}",
            )


def check_quota(
    spec: deployment_pb2.DeploymentSpec,
    sizing: sizing_pb2.Sizing,
    namespace: str,
    quota: policy_pb2.Quota,
    prefix: str,
) -> None:
    """Refuses what a quota could never hold, even if the namespace had nothing else.

    Raises:
        FailedPrecondition: It never could; the message names the field and the remedy.
    """
    wanted = desired_replicas(spec)
    if quota.HasField("replicas") and wanted > quota.replicas:
        raise _quota_exceeded(f"{prefix}replicas", namespace, "replicas", wanted, quota.replicas)
    if quota.HasField("devices") and wanted > 0 and sizing.device_count > quota.devices:
        raise _quota_exceeded(f"{prefix}model", namespace, "devices", sizing.device_count, quota.devices)


def _quota_exceeded(field: str, namespace: str, what: str, needed: int, quota: int) -> FailedPrecondition:
    subject = "one replica needs" if what == "devices" else "it asks for"
    remedy = "choose a smaller model or quantization" if what == "devices" else "ask for fewer replicas"
    return FailedPrecondition(
        f"{field}: {subject} {needed} {what}, and the quota of {namespace} is {quota}; {remedy}, or have an "
        "operator raise the quota",
        reason="ERROR_REASON_QUOTA_EXCEEDED",
        metadata={"field": field, "namespace": namespace, "needed": str(needed), "quota": str(quota)},
    )


def _check_key(key: str, field: str, add: Add) -> None:
    prefix, slash, name = key.rpartition("/")
    wrong_prefix = slash and (len(prefix) > _PREFIX_LENGTH_MAX or not _PREFIX.fullmatch(prefix))
    if wrong_prefix or len(name) > limits.LABEL_LENGTH_MAX or not _NAME.fullmatch(name):
        add(
            field,
            f"`{key[:80]}` is no label key; use letters, digits, `-`, `_` and `.`, at most "
            f"{limits.LABEL_LENGTH_MAX} characters, with a DNS name and `/` in front if you like",
        )


def _check_value(value: str, field: str, add: Add) -> None:
    if value and (len(value) > limits.LABEL_LENGTH_MAX or not _NAME.fullmatch(value)):
        add(
            field,
            f"`{value[:80]}` is no label value; use letters, digits, `-`, `_` and `.`, at most "
            f"{limits.LABEL_LENGTH_MAX} characters",
        )


def _too_many(count: int) -> str:
    return f"has {count} entries; at most {limits.PLACEMENT_ENTRIES_MAX} are taken"
