"""A plan while it is being made: what was decided so far, over accounts that show it already.

In come decisions, out goes the `Plan`. Every change of the accounts is noted, and undone at the end: the
books tell what the records say, and the records change only once the plan has been committed. It decides
nothing.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import partial

from controlplane.scheduler.books import Books
from controlplane.scheduler.explain import Explanation, explain_briefly
from controlplane.scheduler.place import Index
from controlplane.scheduler.reconcile import Class, Sorted
from controlplane.scheduler.rollout import Settled
from controlplane.scheduler.structs import (
    Claim,
    Conclusion,
    Drain,
    Need,
    Place,
    Policy,
    Preemption,
    Remove,
    ReplicaView,
    Reservation,
)

NewReplicaId = Callable[[str], str]


@dataclass(slots=True)
class Draft:
    """What was decided so far.

    Attributes:
        books: The cluster; its accounts show the draft.
        now: The present.
        policy: Bounds.
        new_replica_id: Makes identifiers.
        frozen: Why rescheduling off silent nodes is suspended; empty when it is not.
        held: Replicas that are not given up before it is known what else their deployments lose.
        members: Sorted replicas of the deployments that are looked at.
        leaving: Replicas that the plan drains or removes.
        preemptions: Deployments that the plan takes a replica from.
        wake: When time alone calls for the next look, by deployment.
        reserves: True once room was reserved, or a reservation given up.
        standings: How the launch generations of the deployments that are looked at stand.
    """

    books: Books
    now: datetime
    policy: Policy
    new_replica_id: NewReplicaId
    frozen: str
    held: frozenset[str] = frozenset()
    place: list[Place] = field(default_factory=list)
    drain: list[Drain] = field(default_factory=list)
    remove: list[Remove] = field(default_factory=list)
    conclusions: list[Conclusion] = field(default_factory=list)
    members: dict[str, list[Sorted]] = field(default_factory=dict)
    leaving: set[str] = field(default_factory=set)
    preemptions: dict[str, Preemption] = field(default_factory=dict)
    wake: dict[str, datetime] = field(default_factory=dict)
    reserves: bool = False
    standings: dict[str, Settled] = field(default_factory=dict)
    _indexes: dict[Need, Index] = field(default_factory=dict)
    _explanations: dict[Need, Explanation] = field(default_factory=dict)
    _undo: list[Callable[[], None]] = field(default_factory=list)

    @property
    def empty(self) -> bool:
        """True while nothing was decided that others could feel."""
        return not (self.place or self.drain or self.remove or self.reserves)

    def index(self, need: Need) -> Index:
        """The nodes that fit a need; one index serves all deployments with the same."""
        if need.model and not self.books.caching(need.model):
            # Nobody holds the weights: needs of other models with the same figures are placed alike.
            need = replace(need, model="")
        index = self._indexes.get(need)
        if index is None:
            index = self._indexes[need] = Index(need, self.books)
        return index

    def explanation(self, need: Need) -> Explanation:
        """Why a need fits nowhere now; worked out once for all that wait with the same need."""
        need = replace(need, model="")
        found = self._explanations.get(need)
        if found is None:
            found = self._explanations[need] = explain_briefly(need, self.books)
        return found

    def take(self, deployment: str, node: str, claims: tuple[Claim, ...]) -> None:
        """Books room until the draft is undone."""
        self._explanations.clear()
        self.books.book(deployment, node, claims)
        self._undo.append(partial(self.books.free, deployment, node, claims))

    def give(self, deployment: str, node: str, claims: tuple[Claim, ...]) -> None:
        """Frees room until the draft is undone."""
        self._explanations.clear()
        self.books.free(deployment, node, claims)
        self._undo.append(partial(self.books.book, deployment, node, claims))

    def reserve(self, deployment: str, reservation: Reservation) -> None:
        """Keeps room until the draft is undone."""
        self._explanations.clear()
        self.books.reserve(deployment, reservation)
        self._undo.append(partial(self.books.unreserve, deployment, reservation))

    def unreserve(self, deployment: str, reservation: Reservation) -> None:
        """Gives kept room up until the draft is undone."""
        self._explanations.clear()
        self.books.unreserve(deployment, reservation)
        self._undo.append(partial(self.books.reserve, deployment, reservation))

    def undo(self) -> None:
        """Brings the accounts back to what the records say."""
        for takes_back in reversed(self._undo):
            takes_back()
        self._undo.clear()
        self._indexes.clear()
        self.books.profiles.log.clear()

    def start(self, place: Place) -> None:
        """Decides to start a replica."""
        self.place.append(place)
        self.take(place.deployment, place.node, place.claims)

    def forget(self, each: Sorted, reason: str) -> None:
        """Decides to forget a replica, whose room is free from now on."""
        replica = each.replica
        self.remove.append(Remove(replica.replica, replica.deployment, each.why, reason))
        self.leaving.add(replica.replica)
        self._explanations.clear()
        self.books.leave(replica)
        self._undo.append(partial(self.books.stay, replica))

    def give_up(self, each: Sorted, preempted_by: str = "") -> None:
        """Decides to drain a replica, which holds its room until it has ended."""
        replica = each.replica
        owner = self.books.deployments.get(replica.deployment)
        patience = owner.limits.drain if owner is not None else None
        deadline = self.now + (self.policy.drain if patience is None else patience)
        self.drain.append(Drain(replica.replica, replica.deployment, deadline, each.why, preempted_by))
        self.leaving.add(replica.replica)
        if not replica.observed:
            self.wake_at(replica.deployment, deadline + self.policy.unclaimed_grace)
        self.members[replica.deployment] = [
            replace(one, result=Class.DRAINING) if one.replica is replica else one
            for one in self.members.get(replica.deployment, ())
        ]

    def wake_at(self, deployment: str, *moments: datetime | None) -> None:
        """Notes when time alone calls for another look at a deployment; the past is left out."""
        known = self.wake.get(deployment)
        future = [each for each in (*moments, known) if each is not None and each > self.now]
        if future:
            self.wake[deployment] = min(future)

    def draining_on(self, node: str) -> Iterable[ReplicaView]:
        """Replicas of a node that are on their way out, this draft's among them."""
        removed = {each.replica for each in self.remove}
        for replica in self.books.on_node(node).values():
            if replica.replica not in removed and (replica.draining or replica.replica in self.leaving):
                yield replica
