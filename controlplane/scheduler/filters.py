"""Filters: what refuses a node, each for one reason and with the reason in words.

In come a need, a node and the room left; out comes yes, or a sentence with numbers. Adding a reason is
adding a row to `FILTERS`. Placement, explanations and pre-emption use the same filters, so that they
cannot tell different stories.
"""

from collections.abc import Hashable, Sequence
from typing import Protocol

from controlplane.scheduler.room import Room, usable_kinds
from controlplane.scheduler.structs import DeviceView, Need, NodeView, Taint
from controlplane.sizing.units import format_bytes
from core.states import DeviceKind, Engine, NodeState


class Filter(Protocol):
    """Refuses nodes for one reason.

    Attributes:
        name: Of the rule, in explanations.
    """

    name: str

    def check(self, need: Need, node: NodeView, room: Room) -> bool:
        """True when the node passes."""
        ...

    def explain(self, need: Need, node: NodeView, room: Room) -> str:
        """Why this node was refused, with numbers."""
        ...

    def summarise(self, need: Need, nodes: Sequence[NodeView], room: Room) -> str:
        """Why these nodes were refused, in a few words behind their count."""
        ...


class NodeReady:
    """Heartbeats arrive."""

    name = "NodeReady"

    def check(self, need: Need, node: NodeView, room: Room) -> bool:  # noqa: ARG002 - one signature for all filters
        """True when the node answers."""
        return node.state is NodeState.READY

    def explain(self, need: Need, node: NodeView, room: Room) -> str:  # noqa: ARG002 - as check
        """Says what the node is instead."""
        return f"the node is {node.state.name.lower()}"

    def summarise(self, need: Need, nodes: Sequence[NodeView], room: Room) -> str:  # noqa: ARG002 - as check
        """Names the states."""
        return " or ".join(sorted({node.state.name.lower() for node in nodes}))


class Schedulable:
    """No operator has closed the node."""

    name = "Schedulable"

    def check(self, need: Need, node: NodeView, room: Room) -> bool:  # noqa: ARG002 - one signature for all filters
        """True when the node is open."""
        return not (node.cordoned or node.draining)

    def explain(self, need: Need, node: NodeView, room: Room) -> str:  # noqa: ARG002 - as check
        """Says how the node was closed."""
        return "the node is being drained" if node.draining else "the node is cordoned"

    def summarise(self, need: Need, nodes: Sequence[NodeView], room: Room) -> str:  # noqa: ARG002 - as check
        """Names how they were closed."""
        return " or ".join(sorted({"being drained" if node.draining else "cordoned" for node in nodes}))


class TaintsTolerated:
    """The deployment tolerates every taint of the node."""

    name = "TaintsTolerated"

    def check(self, need: Need, node: NodeView, room: Room) -> bool:  # noqa: ARG002 - one signature for all filters
        """True when it does."""
        return all(each.tolerated_by(need.tolerations) for each in node.taints)

    def explain(self, need: Need, node: NodeView, room: Room) -> str:  # noqa: ARG002 - as check
        """Names the taints that are not tolerated."""
        return f"the node has the taint {self._untolerated(need, [node])}, which is not tolerated"

    def summarise(self, need: Need, nodes: Sequence[NodeView], room: Room) -> str:  # noqa: ARG002 - as check
        """Names all of their taints."""
        return f"with a taint that is not tolerated ({self._untolerated(need, nodes)})"

    def _untolerated(self, need: Need, nodes: Sequence[NodeView]) -> str:
        taints = {each for node in nodes for each in node.taints if not each.tolerated_by(need.tolerations)}
        return ", ".join(sorted(taint_text(each) for each in taints))


class LabelsMatch:
    """The node carries every label that the deployment asks for."""

    name = "LabelsMatch"

    def check(self, need: Need, node: NodeView, room: Room) -> bool:  # noqa: ARG002 - one signature for all filters
        """True when it does."""
        return all(each in node.labels for each in need.node_selector)

    def explain(self, need: Need, node: NodeView, room: Room) -> str:  # noqa: ARG002 - as check
        """Names the labels that are missing, and what the node has instead."""
        labels = dict(node.labels)
        parts = [
            f"{key}={value} is asked for, the node has {key}={labels[key]}"
            if key in labels
            else f"{key}={value} is asked for, the node has no label {key}"
            for key, value in need.node_selector
            if (key, value) not in node.labels
        ]
        return "; ".join(parts)

    def summarise(self, need: Need, nodes: Sequence[NodeView], room: Room) -> str:  # noqa: ARG002 - as check
        """Names the selector."""
        return "without the label " + ", ".join(f"{key}={value}" for key, value in need.node_selector)


class EngineAvailable:
    """The node's agent can start the engine on a kind of device that fits."""

    name = "EngineAvailable"

    def check(self, need: Need, node: NodeView, room: Room) -> bool:  # noqa: ARG002 - one signature for all filters
        """True when it can; every agent can probe a URL."""
        if need.engine is Engine.EXTERNAL:
            return True
        if need.device_count == 0:
            return any(each.engine is need.engine and not each.unavailable_reason for each in node.engines)
        return bool(usable_kinds(need, node))

    def explain(self, need: Need, node: NodeView, room: Room) -> str:  # noqa: ARG002 - as check
        """Says what the agent says."""
        name = need.engine.name.lower()
        reasons = [each.unavailable_reason for each in node.engines if each.engine is need.engine]
        stated = "; ".join(dict.fromkeys(reason for reason in reasons if reason))
        kinds = kinds_text(need.device_kinds)
        return f"{name} cannot be started on {kinds}" + (f": {stated}" if stated else "")

    def summarise(self, need: Need, nodes: Sequence[NodeView], room: Room) -> str:
        """Gives the first node's reason as the example."""
        example = next(
            (text for node in nodes if ": " in (text := self.explain(need, node, room))),
            self.explain(need, nodes[0], room),
        )
        return f"without the engine ({example})"


class DevicePresent:
    """The node has enough equal devices of a kind that fits, whether free or not."""

    name = "DevicePresent"

    def check(self, need: Need, node: NodeView, room: Room) -> bool:  # noqa: ARG002 - one signature for all filters
        """True when it has."""
        return need.device_count == 0 or self.most(need, node) >= need.device_count

    def explain(self, need: Need, node: NodeView, room: Room) -> str:  # noqa: ARG002 - as check
        """Counts the devices."""
        most, kinds = self.most(need, node), kinds_text(need.device_kinds)
        return (
            f"{need.device_count} equal devices of kind {kinds} on one node are needed, this one has {most}"
        )

    def summarise(self, need: Need, nodes: Sequence[NodeView], room: Room) -> str:  # noqa: ARG002 - as check
        """Names the kind."""
        return f"with fewer than {need.device_count} {kinds_text(need.device_kinds)}"

    def most(self, need: Need, node: NodeView) -> int:
        """The most equal devices of a usable kind that the node has."""
        groups: dict[tuple[DeviceKind, int], int] = {}
        kinds = usable_kinds(need, node)
        for device in node.devices:
            if device.kind in kinds:
                group = (device.kind, device.memory_bytes)
                groups[group] = groups.get(group, 0) + 1
        return max(groups.values(), default=0)


class MemoryFree:
    """Enough devices have the memory left, all claims counted, those of draining replicas too."""

    name = "MemoryFree"

    def check(self, need: Need, node: NodeView, room: Room) -> bool:
        """True when they have."""
        return room.fits(need, node.name)

    def explain(self, need: Need, node: NodeView, room: Room) -> str:
        """Tells what is free and what there is."""
        devices = self._devices(need, node)
        largest = self._largest(need, [node], room)
        total = max((device.memory_bytes for device in devices), default=0)
        many = f" on each of {need.device_count} devices" if need.device_count > 1 else ""
        return (
            f"{format_bytes(need.device_memory_bytes)}{many} needed, "
            f"largest free {format_bytes(largest)} of {format_bytes(total)}"
        )

    def summarise(self, need: Need, nodes: Sequence[NodeView], room: Room) -> str:
        """Tells the largest free amount among them."""
        return f"out of memory (largest free {format_bytes(self._largest(need, nodes, room))})"

    def _devices(self, need: Need, node: NodeView) -> list[DeviceView]:
        kinds = usable_kinds(need, node)
        return [device for device in node.devices if device.kind in kinds]

    def _largest(self, need: Need, nodes: Sequence[NodeView], room: Room) -> int:
        free = (
            room.free(node.name, device.device_id) for node in nodes for device in self._devices(need, node)
        )
        return max(0, max(free, default=0))


FILTERS: tuple[Filter, ...] = (
    NodeReady(),
    Schedulable(),
    TaintsTolerated(),
    LabelsMatch(),
    EngineAvailable(),
    DevicePresent(),
    MemoryFree(),
)
"""In the order of asking: what an operator closed first, then what the machine is, then what is left."""

_LASTING = tuple(each for each in FILTERS if not isinstance(each, (MemoryFree, LabelsMatch)))
_NO_ROOM = Room()


def refusing_filter(need: Need, node: NodeView, room: Room) -> Filter | None:
    """The first filter that a node does not pass; None when it passes all."""
    return next((each for each in FILTERS if not each.check(need, node, room)), None)


def passes_lasting(need: Need, node: NodeView) -> bool:
    """True when nothing but labels and the free memory can refuse the node.

    The answer depends on what `traits_of` lists and on nothing else, so that it is worked out once for all
    nodes alike.
    """
    return all(each.check(need, node, _NO_ROOM) for each in _LASTING)


def allows(need: Need, node: NodeView) -> bool:
    """True when the node may hold the need, whatever room is left on it."""
    return LabelsMatch().check(need, node, _NO_ROOM) and passes_lasting(need, node)


def traits_of(node: NodeView) -> Hashable:
    """Everything that `passes_lasting` looks at: nodes with equal traits pass or fail together."""
    groups = sorted((device.kind, device.memory_bytes) for device in node.devices)
    return (node.state, node.cordoned, node.draining, node.taints, tuple(groups), node.engines)


def taint_text(taint: Taint) -> str:
    """Writes a taint as operators do."""
    return f"{taint.key}={taint.value}" if taint.value else taint.key


def kinds_text(kinds: Sequence[DeviceKind]) -> str:
    """Names kinds of device for a person."""
    names = {DeviceKind.CPU: "CPU", DeviceKind.NVIDIA: "NVIDIA GPU"}
    return " or ".join(names.get(kind, kind.name) for kind in kinds) or "any machine"
