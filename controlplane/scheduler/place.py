"""WHERE a replica goes: scorers that rank the nodes which the filters let pass.

In come a need, what is known of its deployment and the books of the cluster; out comes the best placement,
or none. A thousand nodes are not ranked anew for every replica: nodes that hold nothing of the deployment
rank alike for all deployments with the same need, so that one heap a need serves them all, and only the
few others are ranked for each. Ties are broken by name, so that equal snapshots give equal plans.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush
from typing import Protocol

from controlplane.scheduler.filters import allows, passes_lasting
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
    """`1 - heat`, one half where it is not known: among nodes that are equal otherwise, the cooler one."""

    name = "BalanceHeat"
    weight = 0.001

    def score(self, need: Need, node: NodeView, room: Room, preferences: Preferences) -> float:  # noqa: ARG002 - one signature for all scorers
        """See the class."""
        return 0.5 if node.heat is None else 1.0 - min(1.0, max(0.0, node.heat))


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
        traits: Number of each node's traits: nodes with equal numbers pass the lasting filters alike.
        room: What is left.
    """

    nodes: dict[str, NodeView]
    traits: dict[str, int]
    room: Room


_Entry = tuple[float, str, int]
"""Negative score, node, version of the node's account at the time of scoring."""


class Index:
    """The nodes that fit one need, best first, for deployments that have nothing on them.

    It keeps up with the room by its log: a claim costs one new entry, not a new ranking.

    Attributes:
        eligible: Nodes that may hold the need, whatever room is left.
    """

    def __init__(self, need: Need, terrain: Terrain) -> None:
        self._need = need
        self._terrain = terrain
        passing: dict[int, bool] = {}
        self.eligible: dict[str, NodeView] = {}
        for name, node in terrain.nodes.items():
            traits = terrain.traits[name]
            passes = passing.get(traits)
            if passes is None:
                passes = passing[traits] = passes_lasting(need, node)
            if passes and (not need.node_selector or allows(need, node)):
                self.eligible[name] = node
        self.heap: list[_Entry] = []
        for name in self.eligible:
            entry = self._entry(name)
            if entry is not None:
                self.heap.append(entry)
        heapify(self.heap)
        self._read = len(terrain.room.log)

    def catch_up(self) -> None:
        """Ranks the nodes again whose account has changed."""
        log = self._terrain.room.log
        if self._read == len(log):
            return
        for name in set(log[self._read :]):
            if name in self.eligible:
                entry = self._entry(name)
                if entry is not None:
                    heappush(self.heap, entry)
        self._read = len(log)

    def _entry(self, name: str) -> _Entry | None:
        room = self._terrain.room
        if not room.fits(self._need, name):
            return None
        return -score_of(self._need, self.eligible[name], room, _NOTHING), name, room.version(name)


class Search:
    """Finds the nodes for one deployment's replicas, one after the other.

    Between `best` and the next, the caller claims the room and says so with `placed`. Used as a context
    manager: at its end the shared index is as complete as before.
    """

    def __init__(self, need: Need, index: Index, room: Room, preferences: Preferences) -> None:
        self._need = need
        self._index = index
        self._room = room
        self._counts = dict(preferences.replicas_on)
        self._preferences = Preferences(self._counts, preferences.failed_node)
        self._aside: list[_Entry] = []
        self._special: set[str] = set()
        self._special_heap: list[_Entry] = []
        for name in sorted({*self._counts, preferences.failed_node}):
            self._single_out(name)

    def __enter__(self) -> "Search":
        return self

    def __exit__(self, *_: object) -> None:
        for entry in self._aside:
            heappush(self._index.heap, entry)
        self._aside.clear()

    def replicas_on(self, node: str) -> int:
        """Live replicas of the deployment on a node, those that were just placed among them."""
        return self._counts.get(node, 0)

    def score(self, node: str) -> float:
        """Score of an eligible node."""
        return score_of(self._need, self._index.eligible[node], self._room, self._preferences)

    def best(self) -> Placement | None:
        """The best node with its devices; None when none has the room."""
        self._index.catch_up()
        candidates = [each for each in (self._best_ordinary(), self._best_special()) if each is not None]
        if not candidates:
            return None
        found = min(candidates)
        claims = self._room.choose(self._need, found[1])
        assert claims is not None, "the node was found to fit"
        return Placement(found[1], claims, -found[0])

    def placed(self, node: str) -> None:
        """Notes that a replica was placed on a node."""
        self._counts[node] = self._counts.get(node, 0) + 1
        if node not in self._special:
            self._single_out(node)

    def _single_out(self, node: str) -> None:
        """Ranks a node for this deployment alone from now on."""
        if node in self._index.eligible:
            self._special.add(node)
            self._rank(node)

    def _rank(self, node: str) -> None:
        if self._room.fits(self._need, node):
            heappush(self._special_heap, (-self.score(node), node, self._room.version(node)))

    def _best_ordinary(self) -> tuple[float, str] | None:
        heap, room = self._index.heap, self._room
        while heap:
            score, name, version = heap[0]
            if version != room.version(name):
                # Outdated: the entry of its present account stands elsewhere in the heap, if it fits.
                heappop(heap)
            elif name in self._special:
                self._aside.append(heappop(heap))
            else:
                return score, name
        return None

    def _best_special(self) -> tuple[float, str] | None:
        heap = self._special_heap
        while heap:
            score, name, version = heap[0]
            if version == self._room.version(name):
                return score, name
            heappop(heap)
            self._rank(name)
        return None
