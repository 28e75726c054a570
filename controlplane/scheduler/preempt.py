"""WHO makes room for a more important replica: the fewest, then the least important, then the youngest.

In come a need, the room and the replicas that may be asked to go; out comes the cheapest eviction, or
none. The cost of a set of replicas is compared in this order: how many, their priorities from the highest
down, how long they have run from the oldest on. It decides nothing about whether anyone should be
pre-empted at all: that is the caller's part.

The search is exact as long as a group of equal devices has few enough candidates (`SETS_MAX`); beyond,
it takes the devices that are cheapest to clear and gives back every replica that was not needed after
all, so that in every case no proper subset of the answer would do.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import comb

from controlplane.scheduler.room import Room
from controlplane.scheduler.structs import Claim, Drain, Need, ReplicaView

SETS_MAX = 4096
"""Sets of one size that are compared on one group of devices: about 10 ms at the very worst."""

VICTIMS_MAX = 32
"""Replicas that may go for one: their orders and the reservation are one transaction of the store."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A replica that may be asked to go, with its deployment's priority."""

    replica: ReplicaView
    priority: int


Cost = tuple[int, tuple[int, ...], tuple[float, ...]]


@dataclass(frozen=True, slots=True)
class Eviction:
    """Replicas of a node that would have to go, and the devices that a replica could take then."""

    node: str
    claims: tuple[Claim, ...]
    victims: tuple[ReplicaView, ...]
    cost: Cost


def cost_of(candidates: Iterable[Candidate]) -> Cost:
    """What it costs to ask these replicas to go; smaller is better."""
    listed = list(candidates)
    return (
        len(listed),
        tuple(sorted((each.priority for each in listed), reverse=True)),
        tuple(-moment for moment in sorted(each.replica.created.timestamp() for each in listed)),
    )


def preemptors(drains: Iterable[Drain]) -> dict[str, frozenset[str]]:
    """Who pre-empts whom: deployments by the deployment that they take replicas from.

    What a plan starts for a pre-empted deployment stands for the replicas that make room. It may be
    carried out only after the orders that end those: if these are refused, it would be more than is wanted.
    """
    found: dict[str, set[str]] = {}
    for each in drains:
        if each.preempted_by:
            found.setdefault(each.deployment, set()).add(each.preempted_by)
    return {key: frozenset(whom) for key, whom in found.items()}


def cheapest_eviction(
    need: Need,
    nodes: Iterable[str],
    room: Room,
    candidates_on: Callable[[str], Sequence[Candidate]],
    pinned: tuple[str, ...] = (),
) -> Eviction | None:
    """Finds the cheapest set of replicas of one node whose end lets one replica fit; None when there is none.

    Args:
        need: Of the replica that is to fit.
        nodes: Where it may go, in the order in which ties are decided.
        room: What is left.
        candidates_on: Replicas of a node that may be asked to go.
        pinned: Devices that it must have; empty where any will do.
    """
    best: Eviction | None = None
    for node in nodes:
        candidates = candidates_on(node)
        if not candidates:
            continue
        limit = min(VICTIMS_MAX, best.cost[0] if best is not None else VICTIMS_MAX)
        for free in _groups(need, node, room, pinned):
            victims = _smallest(need, free, candidates, limit)
            if victims is None:
                continue
            cost = cost_of(victims)
            if best is None or cost < best.cost:
                claims = _claims(need, free, victims, pinned)
                replicas = sorted((each.replica for each in victims), key=lambda each: each.replica)
                best = Eviction(node, claims, tuple(replicas), cost)
    return best


def _groups(need: Need, node: str, room: Room, pinned: tuple[str, ...]) -> list[dict[str, int]]:
    """Free bytes of each group of equal devices that is large enough; negative where oversubscribed."""
    kinds = room.usable_kinds(need, node)
    found: list[dict[str, int]] = []
    for (kind, memory_bytes), equal in room.groups(node).items():
        if kind not in kinds or memory_bytes < need.device_memory_bytes:
            continue
        free = {name: left for left, name in equal if not pinned or name in pinned}
        if len(free) >= need.device_count:
            found.append(free)
    return found


def _smallest(
    need: Need, free: Mapping[str, int], candidates: Sequence[Candidate], limit: int
) -> tuple[Candidate, ...] | None:
    """The cheapest set of at most `limit` candidates that frees enough devices of a group."""
    claimed: dict[str, list[Candidate]] = {}
    for each in candidates:
        for claim in each.replica.claims:
            if claim.device_id in free:
                claimed.setdefault(claim.device_id, []).append(each)
    # Devices that would have the room if everybody on them went.
    winnable = [name for name in free if _fits(need, free, name, claimed.get(name, ()))]
    if len(winnable) < need.device_count:
        return None
    if need.device_count == 1:
        return _on_one_device(need, free, {name: claimed.get(name, []) for name in winnable}, limit)
    standing = (each for name in winnable for each in claimed.get(name, ()))
    concerned = list({each.replica.replica: each for each in standing}.values())
    for size in range(1, min(limit, len(concerned)) + 1):
        if comb(len(concerned), size) > SETS_MAX:
            return _cleared(need, free, {name: claimed.get(name, []) for name in winnable}, limit)
        fitting = [each for each in combinations(concerned, size) if _enough(need, free, each)]
        if fitting:
            return min(fitting, key=_order)
    return None


def _on_one_device(
    need: Need, free: Mapping[str, int], claimed: Mapping[str, Sequence[Candidate]], limit: int
) -> tuple[Candidate, ...] | None:
    """As `_smallest` for one device: only replicas of the same device ever help each other."""
    largest = {
        name: sorted(on, key=lambda each: (-_bytes(each, name), each.priority, each.replica.replica))
        for name, on in claimed.items()
    }
    sizes: dict[str, int] = {}
    for name, on in largest.items():
        left = free[name]
        for size, each in enumerate(on, start=1):
            left += _bytes(each, name)
            if left >= need.device_memory_bytes:
                sizes[name] = size
                break
    fewest = min(sizes.values(), default=limit + 1)
    if fewest > limit:
        return None
    best: tuple[Candidate, ...] | None = None
    for name in sorted(name for name, size in sizes.items() if size == fewest):
        on = largest[name]
        if comb(len(on), fewest) > SETS_MAX:
            fitting = [tuple(on[:fewest])]
        else:
            fitting = [each for each in combinations(on, fewest) if _fits(need, free, name, each)]
        found = min(fitting, key=_order)
        if best is None or _order(found) < _order(best):
            best = found
    return best


def _cleared(
    need: Need, free: Mapping[str, int], claimed: Mapping[str, Sequence[Candidate]], limit: int
) -> tuple[Candidate, ...] | None:
    """Clears the devices that the fewest stand on, then keeps whoever need not go."""
    cheapest = sorted(claimed, key=lambda name: (len(claimed[name]), name))[: need.device_count]
    going = {each.replica.replica: each for name in cheapest for each in claimed[name]}
    # The most important and oldest stay first.
    for each in sorted(going.values(), key=lambda each: (-each.priority, each.replica.created)):
        rest = [other for other in going.values() if other is not each]
        if _enough(need, free, rest):
            del going[each.replica.replica]
    return tuple(going.values()) if len(going) <= limit else None


def _order(candidates: Sequence[Candidate]) -> tuple[Cost, tuple[str, ...]]:
    return cost_of(candidates), tuple(sorted(each.replica.replica for each in candidates))


def _bytes(candidate: Candidate, device: str) -> int:
    return sum(claim.memory_bytes for claim in candidate.replica.claims if claim.device_id == device)


def _fits(need: Need, free: Mapping[str, int], device: str, going: Iterable[Candidate]) -> bool:
    return free[device] + sum(_bytes(each, device) for each in going) >= need.device_memory_bytes


def _enough(need: Need, free: Mapping[str, int], going: Sequence[Candidate]) -> bool:
    """True when their end leaves enough devices with the room."""
    return sum(1 for name in free if _fits(need, free, name, going)) >= need.device_count


def _claims(
    need: Need, free: Mapping[str, int], going: Sequence[Candidate], pinned: tuple[str, ...]
) -> tuple[Claim, ...]:
    """The devices to take then, the fullest first."""
    after = {name: left + sum(_bytes(each, name) for each in going) for name, left in free.items()}
    amount = need.device_memory_bytes
    fitting = sorted((left, name) for name, left in after.items() if left >= amount)
    chosen = [name for _, name in fitting[: need.device_count]]
    return tuple(Claim(name, amount) for name in (pinned or chosen))
