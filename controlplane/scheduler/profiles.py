"""Nodes that are alike, kept together, so that a thousand machines are ranked as a handful of kinds.

In come nodes and the changes of their room; out come profiles: nodes with the same traits, the same free
memory on the same kinds of device and about the same heat. What filters and scorers say about a node
without regard to labels, cached weights and the deployment's own replicas holds for its whole profile.
Sorted by the largest free device, full machines are passed over without a look. It ranks nothing itself.
"""

from bisect import bisect_left, insort
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from controlplane.scheduler.filters import traits_of
from controlplane.scheduler.room import Group, Room, startable_kinds
from controlplane.scheduler.structs import Need, NodeView
from core.states import DeviceKind, Engine

_TRAITS_SPARE = 1000
"""Traits beyond twice the number of nodes that are kept, for nodes that change and change back."""


@dataclass(slots=True, eq=False)
class Profile:
    """Nodes that are alike.

    Attributes:
        number: Tells profiles apart; grows.
        traits: Number of their traits.
        kinds: Kinds of device on which each engine can be started.
        groups: Free bytes of equal devices, ascending.
        names: The nodes, sorted; empty once there are none any more.
    """

    number: int
    traits: int
    kinds: Mapping[Engine, frozenset[DeviceKind]]
    groups: Mapping[Group, Sequence[int]]
    names: list[str] = field(default_factory=list)

    def fits(self, need: Need) -> bool:
        """True when each of the nodes has the devices free."""
        if need.device_count == 0:
            return True
        available = self.kinds.get(need.engine)
        if not available:
            return False
        amount, count = need.device_memory_bytes, need.device_count
        for (kind, _), free in self.groups.items():
            # The list ascends: if this one has the room, so have all behind it.
            if (
                len(free) >= count
                and free[-count] >= amount
                and kind in need.device_kinds
                and kind in available
            ):
                return True
        return False


class Profiles:
    """All nodes by profile.

    Attributes:
        log: Nodes that came to another profile, oldest first; cleared by its owner.
        traits: Number of each node's traits: nodes with equal numbers pass the lasting filters alike.
    """

    def __init__(self, room: Room) -> None:
        self.log: list[str] = []
        self.traits: dict[str, int] = {}
        self._room = room
        self._nodes: dict[str, NodeView] = {}
        self._of: dict[str, Profile] = {}
        self._by_key: dict[Hashable, Profile] = {}
        self._keys: dict[int, Hashable] = {}
        self._by_largest: dict[DeviceKind, list[tuple[int, int]]] = {}
        self._by_number: dict[int, Profile] = {}
        self._trait_numbers: dict[Hashable, int] = {}
        self._trait_next = 0
        self._next = 0

    def set_node(self, node: NodeView) -> None:
        """Takes a node; its room must be known already."""
        if len(self._trait_numbers) > 2 * len(self._nodes) + _TRAITS_SPARE:
            kept = set(self.traits.values())
            self._trait_numbers = {key: each for key, each in self._trait_numbers.items() if each in kept}
        traits = traits_of(node)
        number = self._trait_numbers.get(traits)
        if number is None:
            number = self._trait_numbers[traits] = self._trait_next
            self._trait_next += 1
        self.traits[node.name] = number
        self._nodes[node.name] = node
        self._room.changed.add(node.name)

    def drop_node(self, name: str) -> None:
        """Forgets a node."""
        self._leave(name)
        del self.traits[name], self._nodes[name]

    def of(self, name: str) -> Profile:
        """The profile of a node."""
        self.refresh()
        return self._of[name]

    def all(self) -> Iterator[Profile]:
        """All profiles, in no particular order."""
        self.refresh()
        yield from tuple(self._by_number.values())

    def with_room(self, need: Need) -> Iterator[Profile]:
        """Profiles that fit a need, in no particular order."""
        self.refresh()
        if need.device_count == 0:
            yield from tuple(self._by_number.values())
            return
        amount = need.device_memory_bytes
        seen: set[int] = set()
        for kind in need.device_kinds:
            ranked = self._by_largest.get(kind, [])
            for _, number in ranked[bisect_left(ranked, (amount, -1)) :]:
                if number not in seen:
                    seen.add(number)
                    profile = self._by_number[number]
                    if profile.fits(need):
                        yield profile

    def refresh(self) -> None:
        """Moves the nodes whose room has changed."""
        changed = self._room.changed
        if not changed:
            return
        for name in changed:
            node = self._nodes.get(name)
            if node is not None:
                self._move(node)
        changed.clear()

    def _move(self, node: NodeView) -> None:
        name, traits = node.name, self.traits[node.name]
        account = self._room.account(name)
        key = (traits, account, heat_step(node))
        profile = self._by_key.get(key)
        old = self._of.get(name)
        if profile is not None and profile is old:
            return
        if old is not None:
            self._leave(name)
        if profile is None:
            profile = Profile(self._next, traits, startable_kinds(node), dict(account))
            self._next += 1
            self._by_key[key] = self._by_number[profile.number] = profile
            self._keys[profile.number] = key
            for kind, largest in _largest(profile).items():
                insort(self._by_largest.setdefault(kind, []), (largest, profile.number))
        insort(profile.names, name)
        self._of[name] = profile
        self.log.append(name)

    def _leave(self, name: str) -> None:
        profile = self._of.pop(name, None)
        if profile is None:
            return
        del profile.names[bisect_left(profile.names, name)]
        if not profile.names:
            del self._by_key[self._keys.pop(profile.number)], self._by_number[profile.number]
            for kind, largest in _largest(profile).items():
                ranked = self._by_largest[kind]
                del ranked[bisect_left(ranked, (largest, profile.number))]


def heat_step(node: NodeView) -> int:
    """Heat in tenths, 5 where it is not known: a finer scale would make every machine a kind of its own."""
    return 5 if node.heat is None else round(10 * min(1.0, max(0.0, node.heat)))


def _largest(profile: Profile) -> dict[DeviceKind, int]:
    """The largest free device of each kind."""
    found: dict[DeviceKind, int] = {}
    for (kind, _), free in profile.groups.items():
        found[kind] = max(found.get(kind, free[-1]), free[-1])
    return found
