"""Placing the missing replicas of one deployment: reserved room first, then pins, then wherever it is best.

In come a draft and what the deployment wants; out come places in the draft, and why the rest could not be
placed. Where nothing fits, a more important deployment may pre-empt: it then holds a reservation until the
room is free. The order is fixed and every choice is by the books, so that equal books give equal plans.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from controlplane.scheduler.draft import Draft
from controlplane.scheduler.explain import Explanation, explain_pin, explain_quota
from controlplane.scheduler.failures import Memory
from controlplane.scheduler.filters import allows
from controlplane.scheduler.place import Placement, Preferences, Search
from controlplane.scheduler.preempt import VICTIMS_MAX, Candidate, Eviction, cheapest_eviction
from controlplane.scheduler.reconcile import Class, Sorted, hold_pins
from controlplane.scheduler.rolling import Intent
from controlplane.scheduler.structs import (
    Claim,
    DeploymentView,
    Pin,
    Place,
    Preemption,
    ReplicaView,
    Reservation,
)
from core.states import Engine, ReplicaState


@dataclass(slots=True)
class Assigned:
    """How placing went.

    Attributes:
        placed: Replicas that the plan starts.
        explanation: Why the next one could not be placed; None when none was refused.
        blocked: Where the refused one should have gone: devices chosen by hand, or None for anywhere.
        coming: True when replicas that drain already will leave the room.
        reservations: Room that is kept from now on.
    """

    placed: int = 0
    explanation: Explanation | None = None
    blocked: Pin | None = None
    coming: bool = False
    reservations: list[Reservation] = field(default_factory=list)


class Assigner:
    """Places the missing replicas of one deployment."""

    def __init__(
        self,
        draft: Draft,
        deployment: DeploymentView,
        members: Sequence[Sorted],
        intent: Intent,
        memory: Memory,
    ) -> None:
        self._draft = draft
        self._deployment = deployment
        self._need = deployment.need
        self._members = members
        self._intent = intent
        self._memory = memory
        self._urls = _missing_urls(deployment, members)
        self._preferences = _preferences(draft, members, memory)
        self._result = Assigned()

    def assign(self, allowed: int) -> Assigned:
        """Places up to `allowed` replicas."""
        external = self._need.engine is Engine.EXTERNAL
        wanted = min(allowed, len(self._urls)) if external else allowed
        result = self._result
        if not wanted and not self._deployment.reservations:
            return result
        search = self._search()
        self._redeem(search, wanted)
        for slot in self._slots():
            if result.placed + len(result.reservations) >= wanted:
                break
            found = self._find(search, slot)
            if found is not None:
                self._start(search, found)
            elif not self._preempt(slot):
                if result.explanation is None:
                    result.explanation, result.blocked = self._explain(slot), slot
                if slot is None:
                    break
        self._draft.reserves |= tuple(result.reservations) != self._deployment.reservations
        return result

    def fits_without(self, replica: ReplicaView, slot: Pin | None) -> bool:
        """True when the room of one of its replicas would let the refused one be placed."""
        draft, key = self._draft, self._deployment.key
        draft.give(key, replica.node, replica.claims)
        fits = self._find(self._search(), slot) is not None
        draft.take(key, replica.node, replica.claims)
        return fits

    def _search(self) -> Search:
        return Search(self._need, self._draft.index(self._need), self._draft.books.room, self._preferences)

    def _slots(self) -> list[Pin | None]:
        """What is missing: the pins that nobody holds, then replicas that may stand anywhere."""
        deployment = self._deployment
        _, pins, free = hold_pins(deployment, self._members)
        for each in self._result.reservations:
            held = each.node, frozenset(claim.device_id for claim in each.claims)
            pin = next((pin for pin in pins if (pin.node, frozenset(pin.device_ids)) == held), None)
            if pin is not None:
                pins.remove(pin)
            else:
                free += 1
        free += sum(1 for each in self._started() if each not in {_place_of(pin) for pin in deployment.pins})
        pins = [pin for pin in pins if _place_of(pin) not in self._started()]
        anywhere = max(0, deployment.desired - min(len(deployment.pins), deployment.desired) - free)
        return [*pins, *[None] * anywhere]

    def _started(self) -> list[tuple[str, frozenset[str]]]:
        return [
            (each.node, frozenset(claim.device_id for claim in each.claims))
            for each in self._draft.place[len(self._draft.place) - self._result.placed :]
        ]

    def _find(self, search: Search, slot: Pin | None) -> Placement | None:
        """The best place within the namespace's quota."""
        usage, namespace = self._draft.books.usage, self._deployment.namespace
        if usage.replicas_spent(namespace):
            return None
        if slot is not None:
            return self._pinned(slot)
        left = usage.devices_left(namespace)
        if left is None or self._need.device_count <= left:
            return search.best()
        # Only devices that the namespace holds already can take it.
        room, index = self._draft.books.room, self._draft.index(self._need)
        best: Placement | None = None
        for node, held in sorted(usage.held_on(namespace).items()):
            claims = room.choose_among(self._need, node, held, left) if index.accepts(node) else None
            if claims is not None and (best is None or search.score(node) > best.score):
                best = Placement(node, claims, search.score(node))
        return best

    def _pinned(self, pin: Pin) -> Placement | None:
        books = self._draft.books
        node = books.nodes.get(pin.node)
        if node is None or len(pin.device_ids) != self._need.device_count or not allows(self._need, node):
            return None
        usable = books.room.usable_kinds(self._need, pin.node)
        kinds = {device.device_id: device.kind for device in node.devices}
        amount = self._need.device_memory_bytes
        claims = tuple(Claim(device, amount) for device in sorted(pin.device_ids))
        if any(kinds.get(device) not in usable for device in pin.device_ids):
            return None
        if not self._free(pin.node, claims) or not books.usage.allows(
            self._deployment.namespace, pin.node, claims
        ):
            return None
        return Placement(pin.node, claims, 1.0)

    def _free(self, node: str, claims: Iterable[Claim]) -> bool:
        room = self._draft.books.room
        return all(room.free(node, each.device_id) >= each.memory_bytes for each in claims)

    def _start(self, search: Search, found: Placement) -> None:
        deployment, result = self._deployment, self._result
        others = search.replicas_on(found.node)
        spread = f"{others} other of its replicas there" if others else "no other replica of it there"
        why = (
            f"{self._intent.missing} of {deployment.desired} replicas missing; {spread}, "
            f"score {found.score:.2f}"
        )
        external = self._need.engine is Engine.EXTERNAL
        self._draft.start(
            Place(
                replica=self._draft.new_replica_id(deployment.key),
                deployment=deployment.key,
                node=found.node,
                claims=found.claims,
                why=why,
                external_url=self._urls[result.placed] if external else "",
                generation=deployment.launch_generation,
            )
        )
        result.placed += 1
        search.placed(found.node)

    # Reserved room and pre-emption.

    def _redeem(self, search: Search, wanted: int) -> None:
        """Places replicas on the room kept for them once it is free, and keeps the rest."""
        draft, key, result = self._draft, self._deployment.key, self._result
        for each in self._deployment.reservations:
            # From here on the reservation is this plan's decision, not the last one's.
            draft.unreserve(key, each)
            node = draft.books.nodes.get(each.node)
            sized = all(claim.memory_bytes == self._need.device_memory_bytes for claim in each.claims)
            open_ = node is not None and allows(self._need, node)
            if not (open_ and sized and len(each.claims) == self._need.device_count):
                continue
            if self._free(each.node, each.claims):
                if result.placed + len(result.reservations) < wanted:
                    self._start(search, Placement(each.node, each.claims, search.score(each.node)))
            elif self._victims_left(each) and result.placed + len(result.reservations) < self._intent.missing:
                draft.reserve(key, each)
                result.reservations.append(each)

    def _victims_left(self, reservation: Reservation) -> bool:
        return any(
            each.replica in reservation.victims and each.preempted_by == self._deployment.key
            for each in self._draft.draining_on(reservation.node)
        )

    def _preempt(self, slot: Pin | None) -> bool:
        """Has less important replicas make room for one more; False where that is not to be."""
        draft, result = self._draft, self._result
        misfit = slot is not None and len(slot.device_ids) != self._need.device_count
        if misfit or not self._may_preempt():
            # Devices chosen by hand for another size would not be taken once they are free.
            return False
        index = draft.index(self._need)
        nodes = index.accepting() if slot is None else [slot.node] if index.accepts(slot.node) else []
        if any(self._fits_after_drains(node, slot) for node in nodes):
            result.coming = True
            return False
        found = cheapest_eviction(
            self._need,
            nodes,
            draft.books.room,
            self._candidates_on,
            tuple(sorted(slot.device_ids)) if slot is not None else (),
        )
        victims = sum(len(each.victims) for each in result.reservations)
        if found is None or victims + len(found.victims) > VICTIMS_MAX:
            return False
        self._evict(found)
        return True

    def _may_preempt(self) -> bool:
        """Whether less important replicas may be asked to go at all.

        Not for a surge above what is wanted; not for an engine that fails, which would end others at each
        attempt; not by who was pre-empted itself, so that one declaration disturbs one other deployment
        and not a row of them; not while nodes are silent in numbers, since room may come back.
        """
        draft, deployment, result = self._draft, self._deployment, self._result
        live = sum(1 for each in self._members if each.result in {Class.CURRENT, Class.STALE})
        shortfall = deployment.desired - live - result.placed - len(result.reservations)
        return (
            shortfall > 0
            and self._need.device_count > 0
            and self._memory.failure is None
            and deployment.preemption is None
            and deployment.key not in draft.preemptions
            and not draft.frozen
            and draft.books.has_priority_below(deployment.priority)
            and not draft.books.usage.refusal(deployment.namespace, self._need)
        )

    def _fits_after_drains(self, node: str, slot: Pin | None) -> bool:
        """True when a node's draining replicas will leave the room by themselves."""
        books = self._draft.books
        draining = [each for each in self._draft.draining_on(node) if each.claims]
        if not draining:
            return False
        for each in draining:
            books.leave(each)
        fits = books.room.fits(self._need, node) if slot is None else self._pinned(slot) is not None
        for each in draining:
            books.stay(each)
        return fits

    def _candidates_on(self, node: str) -> list[Candidate]:
        """Replicas of less important deployments that run there and are to stay."""
        books = self._draft.books
        found: list[Candidate] = []
        for replica in books.on_node(node).values():
            owner = books.deployments.get(replica.deployment)
            if owner is None or owner.uid != replica.uid or owner.priority >= self._deployment.priority:
                continue
            ended = replica.state.terminal or replica.state is ReplicaState.LOST
            if not (replica.draining or ended or replica.replica in self._draft.leaving) and replica.claims:
                found.append(Candidate(replica, owner.priority))
        return found

    def _evict(self, found: Eviction) -> None:
        draft, deployment = self._draft, self._deployment
        for victim in found.victims:
            owner = draft.books.deployments[victim.deployment]
            why = (
                f"pre-empted by {deployment.key} (priority {deployment.priority} over {owner.priority}), "
                f"which needs its room on node {found.node}"
            )
            draft.give_up(Sorted(victim, Class.CURRENT, why), preempted_by=deployment.key)
            draft.preemptions[victim.deployment] = Preemption(
                by=deployment.key,
                by_priority=deployment.priority,
                replica=victim.replica,
                node=found.node,
                time=draft.now,
            )
        reservation = Reservation(
            node=found.node,
            claims=found.claims,
            victims=tuple(each.replica for each in found.victims),
            deadline=draft.now + draft.policy.drain,
        )
        draft.reserve(deployment.key, reservation)
        self._result.reservations.append(reservation)

    # Why not.

    def _explain(self, slot: Pin | None) -> Explanation:
        books = self._draft.books
        refusal = books.usage.refusal(self._deployment.namespace, self._need)
        if refusal:
            return explain_quota(self._deployment.namespace, refusal, self._need)
        if slot is not None:
            return explain_pin(self._need, slot, books.nodes, books.room)
        return self._draft.explanation(self._need)


def _place_of(pin: Pin) -> tuple[str, frozenset[str]]:
    return pin.node, frozenset(pin.device_ids)


def _preferences(draft: Draft, members: Iterable[Sorted], memory: Memory) -> Preferences:
    counts: dict[str, int] = {}
    for each in members:
        lives = each.result in {Class.CURRENT, Class.STALE}
        if lives and each.replica.replica not in draft.leaving:
            counts[each.replica.node] = counts.get(each.replica.node, 0) + 1
    return Preferences(counts, memory.failure.node if memory.failure is not None else "")


def _missing_urls(deployment: DeploymentView, members: Iterable[Sorted]) -> list[str]:
    """URLs of an external deployment that no replica of the present spec stands for."""
    held = {each.replica.external_url for each in members if each.result is Class.CURRENT}
    return [url for url in deployment.external_urls if url not in held]
