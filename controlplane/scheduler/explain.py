"""WHY a replica can or cannot be placed, with counts, and the cheapest change that would let it.

In come a need, the nodes and the room left; out comes an `Explanation`. It uses the very filters that
placement uses, so that it cannot tell a different story.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from controlplane.scheduler.books import Books
from controlplane.scheduler.filters import (
    FILTERS,
    DevicePresent,
    EngineAvailable,
    Filter,
    LabelsMatch,
    MemoryFree,
    Schedulable,
    TaintsTolerated,
    allows,
    kinds_text,
    refusing_filter,
    taint_text,
)
from controlplane.scheduler.place import Preferences, score_of
from controlplane.scheduler.preempt import Candidate, cheapest_eviction
from controlplane.scheduler.room import Room
from controlplane.scheduler.structs import DeploymentView, Need, NodeView, Pin, Snapshot
from controlplane.sizing.units import format_bytes

UNSCHEDULABLE = "Unschedulable"
QUOTA_EXCEEDED = "QuotaExceeded"

_PRIORITY_MAX = 10


@dataclass(frozen=True, slots=True)
class NodeVerdict:
    """What one node means for a need.

    Attributes:
        node: Which.
        failed_rule: Filter that refused it; empty when one more replica fits.
        message: Why, with numbers.
        score: Among those that fit, 0 to 1.
        devices: Those that it would take; empty where it does not fit, or takes none.
    """

    node: str
    failed_rule: str
    message: str
    score: float = 0.0
    devices: tuple[str, ...] = ()

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
        nodes: Every node, by name; empty where they were not asked for.
        reason: In CamelCase, for conditions.
    """

    summary: str
    suggestion: str
    nodes: tuple[NodeVerdict, ...] = ()
    reason: str = UNSCHEDULABLE

    @property
    def sentence(self) -> str:
        """Summary and suggestion in one."""
        return f"{self.summary}; {self.suggestion}" if self.suggestion else self.summary


def explain(need: Need, nodes: Mapping[str, NodeView], room: Room, preferences: Preferences) -> Explanation:
    """Explains, node by node, whether one more replica fits.

    Args:
        need: Of the replica.
        nodes: By name.
        room: What is left.
        preferences: What scorers know of its deployment.
    """
    listed = [node for _, node in sorted(nodes.items())]
    verdicts = [_verdict(need, node, room, preferences) for node in listed]
    counted = _counted(need, [(node, 1) for node in listed], room)
    return replace(counted, nodes=tuple(verdicts))


def explain_briefly(need: Need, books: Books) -> Explanation:
    """Explains in one sentence, without the nodes' verdicts: nodes that are alike are looked at once."""
    alike: list[tuple[NodeView, int]] = []
    for profile in books.profiles.all():
        names: Sequence[str] = profile.names
        if need.node_selector:
            # Labels are not among what makes nodes alike.
            matching = [name for name in names if LabelsMatch().check(need, books.nodes[name], books.room)]
            others = [name for name in names if name not in set(matching)]
            alike += [(books.nodes[each[0]], len(each)) for each in (matching, others) if each]
        else:
            alike.append((books.nodes[names[0]], len(names)))
    return _counted(need, sorted(alike, key=lambda each: each[0].name), books.room)


def _counted(need: Need, alike: Sequence[tuple[NodeView, int]], room: Room) -> Explanation:
    """Counts why nodes were refused, from one of each kind with the number of its kind, by name."""
    refused: dict[str, list[NodeView]] = {}
    numbers: dict[str, int] = {}
    for node, number in alike:
        refusing = refusing_filter(need, node, room)
        name = refusing.name if refusing is not None else ""
        refused.setdefault(name, []).append(node)
        numbers[name] = numbers.get(name, 0) + number
    fitting = numbers.get("", 0)
    counts = [f"{fitting} with room"] if fitting else []
    counts += [
        f"{numbers[each.name]} {each.summarise(need, refused[each.name], room)}"
        for each in FILTERS
        if each.name in refused
    ]
    known = sum(numbers.values())
    total = f"{known} node{'' if known == 1 else 's'}"
    summary = f"needs {need_text(need)}; " + (f"{total}: {', '.join(counts)}" if counts else f"{total} known")
    return Explanation(summary, "" if fitting else _suggestion(need, known, room, refused))


def _verdict(need: Need, node: NodeView, room: Room, preferences: Preferences) -> NodeVerdict:
    refusing = refusing_filter(need, node, room)
    if refusing is not None:
        return NodeVerdict(node.name, refusing.name, refusing.explain(need, node, room))
    devices = tuple(each.device_id for each in room.choose(need, node.name) or ())
    score = score_of(need, node, room, preferences)
    return NodeVerdict(node.name, "", "one more replica fits", score, devices)


def explain_quota(namespace: str, refusal: str, need: Need) -> Explanation:
    """Explains that a namespace may not hold more.

    Args:
        namespace: Which.
        refusal: From `Usage.refusal`.
        need: Of the replica.
    """
    return Explanation(
        summary=f"needs {need_text(need)}; {refusal}",
        suggestion=f"raise the quota of {namespace}, or scale another of its deployments down",
        reason=QUOTA_EXCEEDED,
    )


def explain_pin(need: Need, pin: Pin, nodes: Mapping[str, NodeView], room: Room) -> Explanation:
    """Explains why a replica cannot be placed on the devices that were chosen for it by hand."""
    devices = ", ".join(pin.device_ids)
    summary = f"needs {need_text(need)}, pinned to {devices} of node {pin.node}; "
    remedy = "free these devices, or change placement.device_pins"
    node = nodes.get(pin.node)
    if node is None:
        remedy = "start its agent, or change placement.device_pins"
        return Explanation(f"{summary}no such node is known", remedy)
    refusing = refusing_filter(need, node, Room({node.name: node}))
    if refusing is not None:
        return Explanation(f"{summary}{refusing.explain(need, node, room)}", remedy)
    if len(pin.device_ids) != need.device_count:
        many = f"a replica takes {need.device_count} devices, the pin names {len(pin.device_ids)}"
        return Explanation(summary + many, "name as many devices as a replica takes")
    known = {device.device_id for device in node.devices}
    unknown = [device for device in pin.device_ids if device not in known]
    if unknown:
        return Explanation(f"{summary}the node has no device {', '.join(unknown)}", remedy)
    free = min(room.free(node.name, device) for device in pin.device_ids)
    why = f"{format_bytes(need.device_memory_bytes)} needed on each, {format_bytes(max(0, free))} free"
    return Explanation(summary + why, remedy)


def explain_deployment(snapshot: Snapshot, deployment: str) -> Explanation | None:
    """Explains where one more replica of a deployment could go; None for an unknown deployment."""
    view = snapshot.deployments.get(deployment)
    if view is None:
        return None
    books = Books()
    held = {name: each for name, each in snapshot.replicas.items() if not each.state.terminal}
    books.load(replace(snapshot, replicas=held))
    replicas_on: dict[str, int] = {}
    for replica in books.members(deployment).values():
        if not replica.draining:
            replicas_on[replica.node] = replicas_on.get(replica.node, 0) + 1
    failed_node = view.failure.node if view.failure is not None else ""
    found = explain(view.need, books.nodes, books.room, Preferences(replicas_on, failed_node))
    refusal = books.usage.refusal(view.namespace, view.need)
    if refusal:
        return replace(explain_quota(view.namespace, refusal, view.need), nodes=found.nodes)
    if found.suggestion and (hint := _priority_hint(books, view)):
        found = replace(found, suggestion=f"{found.suggestion}; {hint}")
    return found


def _priority_hint(books: Books, view: DeploymentView) -> str:
    """What a higher priority would do; empty where it would do nothing."""

    def candidates_on(node: str) -> list[Candidate]:
        found = []
        for replica in books.on_node(node).values():
            owner = books.deployments.get(replica.deployment)
            if owner is None or owner.key == view.key or owner.priority >= _PRIORITY_MAX or replica.draining:
                continue
            found.append(Candidate(replica, owner.priority))
        return found

    nodes = [name for name, node in sorted(books.nodes.items()) if allows(view.need, node)]
    eviction = cheapest_eviction(view.need, nodes, books.room, candidates_on)
    if eviction is None:
        return ""
    priority = eviction.cost[1][0] + 1
    if priority <= view.priority:
        return ""
    many = len(eviction.victims)
    owners = ", ".join(sorted({each.deployment for each in eviction.victims}))
    return (
        f"priority {priority} would pre-empt {many} replica{'' if many == 1 else 's'} of {owners} on node "
        f"{eviction.node}"
    )


def need_text(need: Need) -> str:
    """Writes a need for a person."""
    if need.device_count == 0:
        return "no device"
    where = kinds_text(need.device_kinds)
    if need.device_count == 1:
        return f"{format_bytes(need.memory_bytes)} on {where}"
    each = format_bytes(need.device_memory_bytes)
    return f"{format_bytes(need.memory_bytes)} on {need.device_count} x {where} ({each} each)"


def _suggestion(need: Need, known: int, room: Room, refused: Mapping[str, list[NodeView]]) -> str:
    """The cheapest change: opening a node, installing an engine, freeing memory, adding a machine."""
    if not known:
        return "start a node agent"

    opening = _opening(need, room, refused)
    if opening:
        return opening
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
        return f"shorten max_model_len or {_adding(need, refused)}"
    return _adding(need, refused) if need.device_count else "bring a node back"


def _adding(need: Need, refused: Mapping[str, list[NodeView]]) -> str:
    """What a node has to have for one replica, and why those with some of it do not help together."""
    each = format_bytes(need.device_memory_bytes)
    kinds = kinds_text(need.device_kinds)
    if need.device_count == 1:
        return f"add a node with {each} free on {kinds}"
    some = [node for node in refused.get(DevicePresent.name, ()) if DevicePresent().most(need, node)]
    alone = ", since one replica takes the devices of one node" if len(some) > 1 else ""
    return f"add a node with {each} free on each of {need.device_count} x {kinds}{alone}"


def _opening(need: Need, room: Room, refused: Mapping[str, list[NodeView]]) -> str:
    """What would let the need onto a node that is closed to it and has the room; empty for nothing."""

    def first(skipped: type[Filter]) -> NodeView | None:
        others = [each for each in FILTERS if not isinstance(each, skipped)]
        closed = refused.get(skipped.name, ())
        return next((node for node in closed if all(each.check(need, node, room) for each in others)), None)

    if (node := first(Schedulable)) is not None:
        return f"uncordon node {node.name}"
    if (node := first(TaintsTolerated)) is not None:
        taint = next(each for each in node.taints if not each.tolerated_by(need.tolerations))
        return f"tolerate the taint {taint_text(taint)} of node {node.name}"
    if (node := first(LabelsMatch)) is not None:
        return f"drop placement.node_selector, or label node {node.name}"
    return ""
