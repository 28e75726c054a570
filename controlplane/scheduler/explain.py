"""WHY a replica can or cannot be placed, with counts, and the cheapest change that would let it.

In come a need, the nodes and the room left; out comes an `Explanation`. It uses the very filters that
placement uses, so that it cannot tell a different story.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from controlplane.scheduler.place import (
    FILTERS,
    EngineAvailable,
    Filter,
    MemoryFree,
    Preferences,
    Room,
    Schedulable,
    kinds_text,
    refusing_filter,
    score_of,
)
from controlplane.scheduler.structs import Need, NodeView, Snapshot
from controlplane.sizing.units import format_bytes


@dataclass(frozen=True, slots=True)
class NodeVerdict:
    """What one node means for a need.

    Attributes:
        node: Which.
        failed_rule: Filter that refused it; empty when one more replica fits.
        message: Why, with numbers.
        score: Among those that fit, 0 to 1.
    """

    node: str
    failed_rule: str
    message: str
    score: float = 0.0

    @property
    def fits(self) -> bool:
        """True when one more replica fits."""
        return not self.failed_rule


@dataclass(frozen=True, slots=True)
class Explanation:
    """The why of a need.

    Attributes:
        summary: One sentence with counts.
        suggestion: The cheapest change that would fit; empty when it fits.
        nodes: Every node, by name.
    """

    summary: str
    suggestion: str
    nodes: tuple[NodeVerdict, ...]

    @property
    def sentence(self) -> str:
        """Summary and suggestion in one."""
        return f"{self.summary}; {self.suggestion}" if self.suggestion else self.summary


def explain(need: Need, nodes: Mapping[str, NodeView], room: Room, preferences: Preferences) -> Explanation:
    """Explains, node by node, whether one more replica fits."""
    refused: dict[str, list[NodeView]] = {}
    verdicts: list[NodeVerdict] = []
    for name, node in sorted(nodes.items()):
        refusing = refusing_filter(need, node, room)
        if refusing is None:
            score = score_of(need, node, room, preferences)
            verdicts.append(NodeVerdict(name, "", "one more replica fits", score))
        else:
            refused.setdefault(refusing.name, []).append(node)
            verdicts.append(NodeVerdict(name, refusing.name, refusing.explain(need, node, room)))
    fitting = sum(1 for each in verdicts if each.fits)
    counts = [f"{fitting} with room"] if fitting else []
    counts += [
        f"{len(refused[each.name])} {each.summarise(need, refused[each.name], room)}"
        for each in FILTERS
        if each.name in refused
    ]
    total = f"{len(nodes)} node{'' if len(nodes) == 1 else 's'}"
    summary = f"needs {need_text(need)}; " + (f"{total}: {', '.join(counts)}" if counts else f"{total} known")
    return Explanation(
        summary=summary,
        suggestion="" if fitting else _suggestion(need, nodes, room, refused),
        nodes=tuple(verdicts),
    )


def explain_deployment(snapshot: Snapshot, deployment: str) -> Explanation | None:
    """Explains where one more replica of a deployment could go; None for an unknown deployment."""
    view = snapshot.deployments.get(deployment)
    if view is None:
        return None
    room = Room(snapshot.nodes)
    replicas_on: dict[str, int] = {}
    for replica in snapshot.replicas.values():
        if not replica.state.terminal:
            room.claim(replica.node, replica.claims)
        if replica.deployment == deployment and not replica.draining:
            replicas_on[replica.node] = replicas_on.get(replica.node, 0) + 1
    failed_node = view.failure.node if view.failure is not None else ""
    return explain(view.need, snapshot.nodes, room, Preferences(replicas_on, failed_node))


def need_text(need: Need) -> str:
    """Writes a need for a person."""
    if need.device_count == 0:
        return "no device"
    where = kinds_text(need.device_kinds)
    if need.device_count == 1:
        return f"{format_bytes(need.memory_bytes)} on {where}"
    each = format_bytes(need.device_memory_bytes)
    return f"{format_bytes(need.memory_bytes)} on {need.device_count} x {where} ({each} each)"


def _suggestion(
    need: Need, nodes: Mapping[str, NodeView], room: Room, refused: Mapping[str, list[NodeView]]
) -> str:
    """The cheapest change: opening a node, installing an engine, freeing memory, adding a machine."""
    if not nodes:
        return "start a node agent"

    def passes_but(skipped: type[Filter], node: NodeView) -> bool:
        return all(each.check(need, node, room) for each in FILTERS if not isinstance(each, skipped))

    for node in refused.get(Schedulable.name, ()):
        if passes_but(Schedulable, node):
            return f"uncordon node {node.name}"
    for node in refused.get(EngineAvailable.name, ()):
        if any(device.kind in need.device_kinds for device in node.devices):
            return f"install {need.engine.name.lower()} on node {node.name}"
    short = refused.get(MemoryFree.name, ())
    holding = [
        node
        for node in short
        if any(
            device.memory_bytes >= need.device_memory_bytes and device.kind in need.device_kinds
            for device in node.devices
        )
    ]
    if holding:
        return (
            f"scale another deployment on node {holding[0].name} down, shorten max_model_len, or add a node"
        )
    if short:
        return (
            f"shorten max_model_len or add a node with {format_bytes(need.device_memory_bytes)} free a device"
        )
    return f"add a node with {need_text(need)}" if need.device_count else "bring a node back"
