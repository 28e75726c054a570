"""What is left on every device, while a plan is made.

In come nodes and claims, out come answers about free memory that stay cheap while claims change: each
node keeps its devices sorted, and a set tells which nodes have changed. Plain accounting: it refuses
nothing and knows no deployment.
"""

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from controlplane.scheduler.structs import Claim, DeviceView, Need, NodeView
from core.states import DeviceKind, Engine

Group = tuple[DeviceKind, int]
"""Equal devices of a node: kind and memory in bytes."""


@dataclass(slots=True)
class _Ledger:
    """One node's account.

    Attributes:
        devices: What the node has; none for a node that no record speaks of.
        kinds: Kinds of device on which each engine can be started.
        claimed: Bytes taken, by device.
        groups: Equal devices as ascending (free bytes, device); None after a change.
        shares: Claimed share by kinds asked for; emptied by a change.
        version: Grows with every change.
    """

    devices: Mapping[str, DeviceView] = field(default_factory=dict)
    kinds: Mapping[Engine, frozenset[DeviceKind]] = field(default_factory=dict)
    claimed: dict[str, int] = field(default_factory=dict)
    groups: dict[Group, list[tuple[int, str]]] | None = None
    shares: dict[tuple[DeviceKind, ...], float] = field(default_factory=dict)
    version: int = 0

    def changed(self) -> None:
        self.groups = None
        self.shares.clear()
        self.version += 1


class Room:
    """What is left on every device.

    Attributes:
        changed: Names of nodes whose account has changed; cleared by whoever follows it.
    """

    def __init__(self, nodes: Mapping[str, NodeView] | None = None) -> None:
        self.changed: set[str] = set()
        self._ledgers: dict[str, _Ledger] = {}
        for node in (nodes or {}).values():
            self.set_node(node)

    def set_node(self, node: NodeView) -> None:
        """Takes a node's devices and engines; claims on it stand."""
        ledger = self._ledgers.setdefault(node.name, _Ledger())
        ledger.devices = {each.device_id: each for each in node.devices}
        ledger.kinds = startable_kinds(node)
        self._changed(node.name, ledger)

    def drop_node(self, name: str) -> None:
        """Forgets a node's devices; claims on it stand until their replicas are forgotten."""
        ledger = self._ledgers.get(name)
        if ledger is None:
            return
        ledger.devices, ledger.kinds = {}, {}
        self._changed(name, ledger)
        if not ledger.claimed:
            del self._ledgers[name]

    def claim(self, node: str, claims: Iterable[Claim]) -> None:
        """Takes room."""
        ledger = self._ledgers.get(node)
        if ledger is None:
            ledger = self._ledgers[node] = _Ledger()
        for each in claims:
            amount = ledger.claimed.get(each.device_id, 0) + each.memory_bytes
            if amount:
                ledger.claimed[each.device_id] = amount
            else:
                ledger.claimed.pop(each.device_id, None)
        self._changed(node, ledger)
        if not ledger.devices and not ledger.claimed:
            # Nobody speaks of the node and nobody holds anything on it any more.
            del self._ledgers[node]

    def release(self, node: str, claims: Iterable[Claim]) -> None:
        """Gives room back."""
        self.claim(node, [Claim(each.device_id, -each.memory_bytes) for each in claims])

    def version(self, node: str) -> int:
        """Grows with every change of a node's account."""
        ledger = self._ledgers.get(node)
        return ledger.version if ledger is not None else 0

    def free(self, node: str, device_id: str) -> int:
        """Room on a device, bytes; negative where more is claimed than there is."""
        ledger = self._ledgers.get(node)
        if ledger is None:
            return 0
        device = ledger.devices.get(device_id)
        total = device.memory_bytes if device is not None else 0
        return total - ledger.claimed.get(device_id, 0)

    def used_share(self, node: str, kinds: tuple[DeviceKind, ...]) -> float:
        """Share of a node's memory of some kinds that is claimed, 0 to 1."""
        ledger = self._ledgers.get(node)
        if ledger is None:
            return 0.0
        share = ledger.shares.get(kinds)
        if share is None:
            total = claimed = 0
            for device in ledger.devices.values():
                if device.kind in kinds:
                    total += device.memory_bytes
                    claimed += ledger.claimed.get(device.device_id, 0)
            share = ledger.shares[kinds] = min(1.0, max(0.0, claimed / total)) if total else 0.0
        return share

    def groups(self, node: str) -> Mapping[Group, Sequence[tuple[int, str]]]:
        """Equal devices of a node, each as (free bytes, device), the fullest first."""
        ledger = self._ledgers.get(node)
        if ledger is None:
            return {}
        if ledger.groups is None:
            found: dict[Group, list[tuple[int, str]]] = {}
            for device in ledger.devices.values():
                free = device.memory_bytes - ledger.claimed.get(device.device_id, 0)
                found.setdefault((device.kind, device.memory_bytes), []).append((free, device.device_id))
            for equal in found.values():
                equal.sort()
            ledger.groups = dict(sorted(found.items()))
        return ledger.groups

    def account(self, node: str) -> tuple[tuple[Group, tuple[int, ...]], ...]:
        """Free bytes of each group of equal devices, ascending: equal for nodes with the same room."""
        return tuple((group, tuple(free for free, _ in equal)) for group, equal in self.groups(node).items())

    def fits(self, need: Need, node: str) -> bool:
        """True when the node has the devices free, all claims counted."""
        return need.device_count == 0 or self._fitting(need, node) is not None

    def choose(self, need: Need, node: str) -> tuple[Claim, ...] | None:
        """Picks devices of a node: equal ones, the fullest that still fit first; None when none fit."""
        if need.device_count == 0:
            return ()
        equal = self._fitting(need, node)
        if equal is None:
            return None
        amount = need.device_memory_bytes
        start = bisect_left(equal, (amount, ""))
        return tuple(Claim(device_id, amount) for _, device_id in equal[start : start + need.device_count])

    def choose_among(
        self, need: Need, node: str, held: Mapping[str, object], new_max: int
    ) -> tuple[Claim, ...] | None:
        """Picks devices as `choose` does, at most `new_max` of them outside those that are held already."""
        amount = need.device_memory_bytes
        for kind in self.usable_kinds(need, node):
            for (group_kind, _), equal in self.groups(node).items():
                if group_kind is not kind:
                    continue
                fitting = sorted((name not in held, free, name) for free, name in equal if free >= amount)
                chosen = fitting[: need.device_count]
                if len(chosen) == need.device_count and sum(new for new, _, _ in chosen) <= new_max:
                    return tuple(Claim(name, amount) for _, _, name in chosen)
        return None

    def usable_kinds(self, need: Need, node: str) -> tuple[DeviceKind, ...]:
        """Kinds of device on which the node can run the engine for this need, best first."""
        ledger = self._ledgers.get(node)
        available = ledger.kinds.get(need.engine) if ledger is not None else None
        return tuple(kind for kind in need.device_kinds if kind in available) if available else ()

    def _fitting(self, need: Need, node: str) -> Sequence[tuple[int, str]] | None:
        """The best group with enough devices that have the room."""
        amount, count = need.device_memory_bytes, need.device_count
        kinds = self.usable_kinds(need, node)
        if not kinds:
            return None
        groups = self.groups(node)
        for kind in kinds:
            for (group_kind, _), equal in groups.items():
                # The list ascends: if this one has the room, so have all behind it.
                if group_kind is kind and len(equal) >= count and equal[-count][0] >= amount:
                    return equal
        return None

    def _changed(self, node: str, ledger: _Ledger) -> None:
        ledger.changed()
        self.changed.add(node)


def startable_kinds(node: NodeView) -> dict[Engine, frozenset[DeviceKind]]:
    """Kinds of device on which a node can start each engine."""
    found: dict[Engine, frozenset[DeviceKind]] = {}
    for each in node.engines:
        if not each.unavailable_reason:
            found[each.engine] = found.get(each.engine, frozenset()) | each.device_kinds
    return found


def usable_kinds(need: Need, node: NodeView) -> tuple[DeviceKind, ...]:
    """Kinds of device on which the node can run the engine for this need, best first."""
    available = startable_kinds(node).get(need.engine, frozenset())
    return tuple(kind for kind in need.device_kinds if kind in available)
