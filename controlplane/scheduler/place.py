"""WHERE a replica can go: filters that refuse nodes, scorers that rank the rest.

In come a need, the nodes and the room that is left on their devices; out comes the best placement, or
none. Filters and scorers are small objects in ordered tables: adding one is adding a row. Ties are
broken by name, so that equal snapshots give equal plans.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from controlplane.scheduler.structs import Claim, DeviceView, Need, NodeView
from controlplane.sizing.units import format_bytes
from core.states import DeviceKind, Engine, NodeState


class Room:
    """What is left on every device, while a plan is made."""

    def __init__(self, nodes: Mapping[str, NodeView]) -> None:
        self._total = {
            (node.name, device.device_id): device.memory_bytes
            for node in nodes.values()
            for device in node.devices
        }
        self._claimed: dict[tuple[str, str], int] = {}

    def claim(self, node: str, claims: Iterable[Claim]) -> None:
        """Takes room."""
        for each in claims:
            key = (node, each.device_id)
            self._claimed[key] = self._claimed.get(key, 0) + each.memory_bytes

    def release(self, node: str, claims: Iterable[Claim]) -> None:
        """Gives room back."""
        self.claim(node, (Claim(each.device_id, -each.memory_bytes) for each in claims))

    def free(self, node: str, device_id: str) -> int:
        """Room on a device, bytes; negative where more is claimed than there is."""
        key = (node, device_id)
        return self._total.get(key, 0) - self._claimed.get(key, 0)

    def used_share(self, node: NodeView, kinds: Sequence[DeviceKind]) -> float:
        """Share of a node's memory of some kinds that is claimed, 0 to 1."""
        total = claimed = 0
        for device in node.devices:
            if device.kind in kinds:
                total += device.memory_bytes
                claimed += self._claimed.get((node.name, device.device_id), 0)
        return min(1.0, max(0.0, claimed / total)) if total else 0.0


def usable_kinds(need: Need, node: NodeView) -> tuple[DeviceKind, ...]:
    """Kinds of device on which the node can run the engine for this need, best first."""
    available = {
        kind
        for each in node.engines
        if each.engine is need.engine and not each.unavailable_reason
        for kind in each.device_kinds
    }
    return tuple(kind for kind in need.device_kinds if kind in available)


def choose_devices(need: Need, node: NodeView, room: Room) -> tuple[Claim, ...] | None:
    """Picks devices of a node: equal ones, the fullest that still fit first; None when none fit."""
    if need.device_count == 0:
        return ()
    for kind in usable_kinds(need, node):
        amount = need.device_memory_bytes
        fitting: dict[int, list[tuple[int, str]]] = {}
        for device in node.devices:
            if device.kind is kind and (free := room.free(node.name, device.device_id)) >= amount:
                fitting.setdefault(device.memory_bytes, []).append((free, device.device_id))
        for _, equal in sorted(fitting.items()):
            if len(equal) >= need.device_count:
                chosen = sorted(equal)[: need.device_count]
                return tuple(Claim(device_id, amount) for _, device_id in chosen)
    return None


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
        return need.device_count == 0 or self._most(need, node) >= need.device_count

    def explain(self, need: Need, node: NodeView, room: Room) -> str:  # noqa: ARG002 - as check
        """Counts the devices."""
        most, kinds = self._most(need, node), kinds_text(need.device_kinds)
        return f"{need.device_count} equal devices of kind {kinds} are needed, the node has {most}"

    def summarise(self, need: Need, nodes: Sequence[NodeView], room: Room) -> str:  # noqa: ARG002 - as check
        """Names the kind."""
        return f"with fewer than {need.device_count} {kinds_text(need.device_kinds)}"

    def _most(self, need: Need, node: NodeView) -> int:
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
        return choose_devices(need, node, room) is not None

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


FILTERS: tuple[Filter, ...] = (NodeReady(), Schedulable(), EngineAvailable(), DevicePresent(), MemoryFree())


@dataclass(frozen=True, slots=True)
class Preferences:
    """What scorers know of a deployment besides its need.

    Attributes:
        replicas_on: Node to live replicas of the deployment there.
        failed_node: Where its last failure happened; empty for none.
    """

    replicas_on: Mapping[str, int]
    failed_node: str = ""

    def with_replica(self, node: str) -> "Preferences":
        """The same after one more replica was placed on a node."""
        counted = {**self.replicas_on, node: self.replicas_on.get(node, 0) + 1}
        return Preferences(counted, self.failed_node)


class Scorer(Protocol):
    """Ranks a node.

    Attributes:
        name: Of the scorer.
        weight: Its say against the others.
    """

    name: str
    weight: float

    def score(self, need: Need, node: NodeView, room: Room, preferences: Preferences) -> float:
        """From 0, worst, to 1, best."""
        ...


class SpreadReplicas:
    """`1 / (1 + replicas of the deployment on the node)`: one machine's loss should not take all."""

    name = "SpreadReplicas"
    weight = 10.0

    def score(self, need: Need, node: NodeView, room: Room, preferences: Preferences) -> float:  # noqa: ARG002 - one signature for all scorers
        """See the class."""
        return 1.0 / (1 + preferences.replicas_on.get(node.name, 0))


class AvoidFailedNode:
    """0 where the last attempt failed, 1 elsewhere: the cause may be the machine's."""

    name = "AvoidFailedNode"
    weight = 3.0

    def score(self, need: Need, node: NodeView, room: Room, preferences: Preferences) -> float:  # noqa: ARG002 - one signature for all scorers
        """See the class."""
        return 0.0 if node.name == preferences.failed_node else 1.0


class FillUsedNodes:
    """Share of the memory that is claimed already: empty machines stay free for large models."""

    name = "FillUsedNodes"
    weight = 1.0

    def score(self, need: Need, node: NodeView, room: Room, preferences: Preferences) -> float:  # noqa: ARG002 - one signature for all scorers
        """See the class."""
        return room.used_share(node, need.device_kinds)


SCORERS: tuple[Scorer, ...] = (SpreadReplicas(), AvoidFailedNode(), FillUsedNodes())
_TOTAL_WEIGHT = sum(each.weight for each in SCORERS)


@dataclass(frozen=True, slots=True)
class Placement:
    """A node, the devices on it, and how good it is, 0 to 1."""

    node: str
    claims: tuple[Claim, ...]
    score: float


def refusing_filter(need: Need, node: NodeView, room: Room) -> Filter | None:
    """The first filter that a node does not pass; None when it passes all."""
    return next((each for each in FILTERS if not each.check(need, node, room)), None)


def score_of(need: Need, node: NodeView, room: Room, preferences: Preferences) -> float:
    """Weighted mean of all scorers, 0 to 1."""
    weighted = sum(each.weight * each.score(need, node, room, preferences) for each in SCORERS)
    return weighted / _TOTAL_WEIGHT


def eligible_nodes(need: Need, nodes: Mapping[str, NodeView]) -> dict[str, NodeView]:
    """Nodes that pass every filter but the one on free memory: the same for all replicas of a plan."""
    empty = Room({})
    lasting = [each for each in FILTERS if not isinstance(each, MemoryFree)]
    return {
        name: node
        for name, node in sorted(nodes.items())
        if all(each.check(need, node, empty) for each in lasting)
    }


def find_placement(
    need: Need, eligible: Mapping[str, NodeView], room: Room, preferences: Preferences
) -> Placement | None:
    """Returns the best node with its devices; None when none has the room.

    Args:
        need: Of one replica.
        eligible: From `eligible_nodes`, in the order of names.
        room: What is left.
        preferences: What scorers know.
    """
    best: Placement | None = None
    for name, node in eligible.items():
        claims = choose_devices(need, node, room)
        if claims is None:
            continue
        score = score_of(need, node, room, preferences)
        if best is None or score > best.score:
            best = Placement(name, claims, score)
    return best


def kinds_text(kinds: Sequence[DeviceKind]) -> str:
    """Names kinds of device for a person."""
    names = {DeviceKind.CPU: "CPU", DeviceKind.NVIDIA: "NVIDIA GPU"}
    return " or ".join(names.get(kind, kind.name) for kind in kinds) or "any machine"
