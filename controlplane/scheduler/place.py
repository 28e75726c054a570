"""WHERE a replica goes: scorers that rank the nodes which the filters let pass.

In come a need, what is known of its deployment and the books of the cluster; out comes the best placement,
or none. A thousand nodes are not ranked anew for every replica: nodes that hold nothing of the deployment
rank alike for all deployments with the same need, so that one heap a need serves them all, and only the
few others are ranked for each. Ties are broken by name, so that equal snapshots give equal plans.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from heapq import heappop, heappush, heapreplace
from typing import Protocol

from controlplane.scheduler.filters import passes_lasting
from controlplane.scheduler.profiles import Profile, Profiles, heat_step
from controlplane.scheduler.room import Room
from controlplane.scheduler.structs import Claim, Need, NodeView


@dataclass(frozen=True, slots=True)
class Preferences:
    """What scorers know of a deployment besides its need.

    Attributes:
        replicas_on: Node to live replicas of the deployment there.
        failed_node: Where its last failure happened; empty for none.
    """

    replicas_on: Mapping[str, int] = field(default_factory=dict)
    failed_node: str = ""


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


class HoldsModel:
    """1 where the weights are on the machine already, 0 elsewhere: fetching them takes minutes."""

    name = "HoldsModel"
    weight = 2.0

    def score(self, need: Need, node: NodeView, room: Room, preferences: Preferences) -> float:  # noqa: ARG002 - one signature for all scorers
        """See the class."""
        return 1.0 if need.model and need.model in node.cached_models else 0.0


class FillUsedNodes:
    """Share of the memory that is claimed already: empty machines stay free for large models."""

    name = "FillUsedNodes"
    weight = 1.0

    def score(self, need: Need, node: NodeView, room: Room, preferences: Preferences) -> float:  # noqa: ARG002 - one signature for all scorers
        """See the class."""
        return room.used_share(node.name, need.device_kinds)


class BalanceHeat:
    """`1 - heat` in tenths, one half where it is not known: of nodes otherwise equal, the cooler one."""

    name = "BalanceHeat"
    weight = 0.001

    def score(self, need: Need, node: NodeView, room: Room, preferences: Preferences) -> float:  # noqa: ARG002 - one signature for all scorers
        """See the class."""
        return 1.0 - heat_step(node) / 10


SCORERS: tuple[Scorer, ...] = (
    SpreadReplicas(),
    AvoidFailedNode(),
    HoldsModel(),
    FillUsedNodes(),
    BalanceHeat(),
)
_TOTAL_WEIGHT = sum(each.weight for each in SCORERS)
_NOTHING = Preferences()


@dataclass(frozen=True, slots=True)
class Placement:
    """A node, the devices on it, and how good it is, 0 to 1."""

    node: str
    claims: tuple[Claim, ...]
    score: float


def score_of(need: Need, node: NodeView, room: Room, preferences: Preferences) -> float:
    """Weighted mean of all scorers, 0 to 1."""
    weighted = 0.0
    for each in SCORERS:
        weighted += each.weight * each.score(need, node, room, preferences)
    return weighted / _TOTAL_WEIGHT


class Terrain(Protocol):
    """What a search needs of the books.

    Attributes:
        nodes: By name.
        room: What is left.
        profiles: Nodes that are alike.
    """

    nodes: dict[str, NodeView]
    room: Room
    profiles: Profiles

    def caching(self, model: str) -> Iterable[str]:
        """Nodes that hold a model's weights."""
        ...


_Entry = tuple[float, str, int, Profile]
"""Negative score, first node, number of the profile, profile."""


class Index:
    """The nodes that fit one need, best first, for deployments that have nothing on them.

    It ranks profiles, not nodes, and keeps up with changes of the room by the profiles' log.
    """

    def __init__(self, need: Need, terrain: Terrain) -> None:
        self._need = need
        # Nodes that hold the weights are ranked by themselves.
        self._plain = replace(need, model="") if need.model else need
        self._terrain = terrain
        self._passing: dict[int, bool] = {}
        self._scores: dict[int, float | None] = {}
        self.caching = [name for name in terrain.caching(need.model) if self.accepts(name)]
        self.heap: list[_Entry] = []
        for profile in terrain.profiles.with_room(need):
            self._push(profile, profile.names[0])
        self._read = len(terrain.profiles.log)

    def accepts(self, name: str) -> bool:
        """True when a node may hold the need, whatever room is left."""
        node = self._terrain.nodes.get(name)
        if node is None or not self._passes(name, self._terrain.profiles.traits[name]):
            return False
        return all(each in node.labels for each in self._need.node_selector)

    def accepting(self) -> list[str]:
        """All such nodes, by name."""
        return sorted(name for name in self._terrain.nodes if self.accepts(name))

    def node(self, name: str) -> NodeView:
        """A node."""
        return self._terrain.nodes[name]

    def best(self, passed_over: Callable[[str], bool]) -> tuple[float, str] | None:
        """Negative score and name of the best node that is not to be passed over; None when there is none."""
        self._catch_up()
        heap, aside = self.heap, dict[int, _Entry]()
        found: tuple[float, str] | None = None
        while heap:
            score, first, number, profile = heap[0]
            name = self._first(profile, passed_over)
            if name is None:
                # Empty by now, or passed over in this search only.
                heappop(heap)
                if profile.names:
                    aside[number] = (score, profile.names[0], number, profile)
            elif name != first:
                heapreplace(heap, (score, name, number, profile))
            else:
                found = score, name
                break
        for entry in aside.values():
            heappush(heap, entry)
        return found

    def _first(self, profile: Profile, passed_over: Callable[[str], bool]) -> str | None:
        selector = self._need.node_selector
        for name in profile.names:
            if not passed_over(name) and (not selector or self.accepts(name)):
                return name
        return None

    def _catch_up(self) -> None:
        """Takes in the nodes that came to another profile."""
        profiles = self._terrain.profiles
        profiles.refresh()
        for name in profiles.log[self._read :]:
            if name in self._terrain.nodes:
                self._push(profiles.of(name), name)
        self._read = len(profiles.log)

    def _push(self, profile: Profile, name: str) -> None:
        number = profile.number
        if number not in self._scores:
            fits = profile.fits(self._need) and self._passes(profile.names[0], profile.traits)
            node = self._terrain.nodes[profile.names[0]]
            score = -score_of(self._plain, node, self._terrain.room, _NOTHING) if fits else None
            self._scores[number] = score
        score = self._scores[number]
        if score is not None:
            heappush(self.heap, (score, name, number, profile))

    def _passes(self, name: str, traits: int) -> bool:
        passes = self._passing.get(traits)
        if passes is None:
            passes = self._passing[traits] = passes_lasting(self._need, self._terrain.nodes[name])
        return passes


class Search:
    """Finds the nodes for one deployment's replicas, one after the other.

    Between `best` and the next, the caller claims the room and says so with `placed`. Nodes on which the
    deployment has something, whose weights are there or where it failed are ranked for it alone.
    """

    def __init__(self, need: Need, index: Index, room: Room, preferences: Preferences) -> None:
        self._need = need
        self._index = index
        self._room = room
        self._counts = dict(preferences.replicas_on)
        self._preferences = Preferences(self._counts, preferences.failed_node)
        self._special: set[str] = set()
        self._heap: list[tuple[float, str, int]] = []
        for name in sorted({*self._counts, preferences.failed_node, *index.caching}):
            self._single_out(name)

    def replicas_on(self, node: str) -> int:
        """Live replicas of the deployment on a node, those that were just placed among them."""
        return self._counts.get(node, 0)

    def score(self, node: str) -> float:
        """Score of a node."""
        return score_of(self._need, self._index.node(node), self._room, self._preferences)

    def best(self) -> Placement | None:
        """The best node with its devices; None when none has the room."""
        ordinary = self._index.best(self._special.__contains__)
        candidates = [each for each in (ordinary, self._best_special()) if each is not None]
        if not candidates:
            return None
        score, name = min(candidates)
        claims = self._room.choose(self._need, name)
        assert claims is not None, "the node was found to fit"
        return Placement(name, claims, -score)

    def placed(self, node: str) -> None:
        """Notes that a replica was placed on a node."""
        self._counts[node] = self._counts.get(node, 0) + 1
        if node not in self._special:
            self._single_out(node)

    def _single_out(self, node: str) -> None:
        """Ranks a node for this deployment alone from now on."""
        if self._index.accepts(node):
            self._special.add(node)
            self._rank(node)

    def _rank(self, node: str) -> None:
        if self._room.fits(self._need, node):
            heappush(self._heap, (-self.score(node), node, self._room.version(node)))

    def _best_special(self) -> tuple[float, str] | None:
        while self._heap:
            score, name, version = self._heap[0]
            if version == self._room.version(name):
                return score, name
            # Something was placed there since.
            heappop(self._heap)
            self._rank(name)
        return None
