"""The driver: from the books of the cluster to a plan.

In come the books, the time and a source of replica identifiers; out comes a `Plan`. It asks `reconcile`
what each replica is, `failures` when to try again, `rolling` how many to start and give up, and `assign`
where. Pure: equal books give equal plans, and the plan of a state in which the plan was carried out is
empty.

A `Planner` lives on from plan to plan and looks only at deployments whose plan can have changed: those
whose records changed, those whose time has come, and those that wait for room whenever something that
holds room has changed. Looking at all of them would give the same plan; that is a property the tests hold.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from heapq import heapify, heappop, heappush

from controlplane.scheduler.assign import Assigned, Assigner
from controlplane.scheduler.books import Books
from controlplane.scheduler.conclude import Outcome, conclude
from controlplane.scheduler.draft import Draft, NewReplicaId
from controlplane.scheduler.failures import Memory, remember
from controlplane.scheduler.reconcile import (
    Case,
    Class,
    Sorted,
    classify,
    frozen_reason,
    hold_pins,
)
from controlplane.scheduler.rolling import Intent, intend
from controlplane.scheduler.rollout import settle
from controlplane.scheduler.structs import (
    Conclusion,
    DeploymentView,
    Plan,
    Policy,
    Preemption,
    Snapshot,
)
from core.states import NodeState

_REMOVED = {
    Class.ENDED: "Stopped",
    Class.FAILED: "ReplicaFailed",
    Class.LOST: "NodeLost",
}
_LIVING = {Class.CURRENT, Class.STALE}


@dataclass(slots=True)
class _Memory:
    """What is known of a deployment's last look.

    Attributes:
        wake: When time alone calls for another; None when only a change does.
        settled: False when it was to be changed, so that it must be looked at whatever happens.
        epoch: Of the books when it was found to wait for room; None when it waits for nothing.
    """

    wake: datetime | None
    settled: bool
    epoch: int | None


def plan(
    snapshot: Snapshot, now: datetime, new_replica_id: NewReplicaId, policy: Policy | None = None
) -> Plan:
    """Decides what to do now, looking at everything.

    Args:
        snapshot: The cluster.
        now: The present; aware.
        new_replica_id: Makes an identifier, unique for all time, for a new replica of a deployment.
        policy: Bounds; the defaults where it is None.
    """
    planner = Planner(policy)
    planner.books.load(snapshot)
    return planner.plan(now, new_replica_id)


class Planner:
    """Plans again and again over books that its owner keeps up to date.

    Attributes:
        books: The cluster, as the records say.
        conclusions: The latest of every deployment.
    """

    def __init__(self, policy: Policy | None = None) -> None:
        self.books = Books()
        self.conclusions: dict[str, Conclusion] = {}
        self._policy = policy or Policy()
        self._memory: dict[str, _Memory] = {}
        self._frozen = ""

    def plan(self, now: datetime, new_replica_id: NewReplicaId) -> Plan:
        """Decides what to do now.

        Args:
            now: The present; aware.
            new_replica_id: Makes an identifier, unique for all time, for a new replica of a deployment.
        """
        books = self.books
        frozen = frozen_reason(books.nodes, books.holding(), self._policy)
        if frozen != self._frozen:
            self._frozen = frozen
            books.epoch += 1
            silent = [name for name, node in books.nodes.items() if node.state is not NodeState.READY]
            for name in silent:
                books.dirty.update(each.deployment for each in books.on_node(name).values())
        agenda, waiting = self._agenda(now)
        draft = self._drafted(agenda, now, new_replica_id)
        if waiting and not draft.empty:
            # What was decided may give room to those that wait, or take it.
            draft = self._drafted(agenda | waiting, now, new_replica_id)
            agenda |= waiting
        self._remember(draft, agenda)
        wakes = [each.wake for each in self._memory.values() if each.wake is not None]
        return Plan(
            place=tuple(draft.place),
            drain=tuple(draft.drain),
            remove=tuple(draft.remove),
            conclusions=tuple(sorted(draft.conclusions, key=lambda each: each.deployment)),
            retry_after=min((each for each in wakes if each > now), default=None),
            frozen=frozen,
        )

    def look_again(self, keys: Iterable[str]) -> None:
        """Has deployments looked at by the next plan: what was planned for them did not come about."""
        self.books.dirty.update(keys)

    def _agenda(self, now: datetime) -> tuple[set[str], set[str]]:
        """Deployments to look at, and those to add if anything is decided about room."""
        agenda, waiting = set(self.books.dirty), set()
        for key, memory in self._memory.items():
            due = memory.wake is not None and memory.wake <= now
            if due or not memory.settled or memory.epoch not in {None, self.books.epoch}:
                agenda.add(key)
            elif memory.epoch is not None:
                waiting.add(key)
        return agenda, waiting - agenda

    def _remember(self, draft: Draft, agenda: set[str]) -> None:
        """Keeps what the next plan needs to know of this one."""
        touched = {each.deployment for each in draft.place}
        touched |= {each.deployment for each in draft.drain}
        touched |= {each.deployment for each in draft.remove}
        concluded = {each.deployment: each for each in draft.conclusions}
        for key in agenda | concluded.keys():
            conclusion = concluded.get(key)
            if conclusion is None:
                self.conclusions.pop(key, None)
                if not self.books.members(key):
                    self._memory.pop(key, None)
                    continue
            else:
                self.conclusions[key] = conclusion
            pending = conclusion is not None and conclusion.pending > 0
            # An account that shows decisions is not the books' own: what it let wait has to ask again.
            epoch = (self.books.epoch if draft.empty else -1) if pending else None
            self._memory[key] = _Memory(draft.wake.get(key), key not in touched, epoch)
        self.books.dirty.clear()

    def _drafted(self, agenda: set[str], now: datetime, new_replica_id: NewReplicaId) -> Draft:
        """A draft in which nobody gives up what it needs once more important ones have taken from it.

        What a deployment gives up is room to come for whoever is planned before it, so that it is decided
        first. Where it turns out to have been too much, the draft is made anew with the regretted
        replicas held back until it is known what else the deployment loses.
        """
        draft, regretted = self._attempted(agenda, now, new_replica_id, frozenset())
        if regretted:
            draft, regretted = self._attempted(agenda, now, new_replica_id, frozenset(regretted))
        if regretted:
            # Where everything is held back, nothing can be regretted.
            everything = frozenset(name for key in agenda for name in self.books.members(key))
            draft, _ = self._attempted(agenda, now, new_replica_id, everything)
        return draft

    def _attempted(
        self, agenda: set[str], now: datetime, new_replica_id: NewReplicaId, held: frozenset[str]
    ) -> tuple[Draft, set[str]]:
        draft = Draft(self.books, now, self._policy, new_replica_id, self._frozen, held)
        try:
            return draft, _decide(draft, agenda)
        finally:
            draft.undo()


def _decide(draft: Draft, agenda: set[str]) -> set[str]:
    """Decides about deployments and those that they take from; returns what was given up too early."""
    regretted: set[str] = set()
    for key in sorted(agenda):
        _sort(draft, key)
    intents = {key: intent for key in sorted(agenda) if (intent := _give_up(draft, key)) is not None}
    queue = [_rank(draft, key, living=_lives(draft, key)) for key in intents]
    heapify(queue)
    queued = set(intents)
    while queue:
        key = heappop(queue)[-1]
        owner, intent = _owner(draft, key), intents.get(key)
        if intent is None or key in draft.preemptions or _holds_back(draft, intent):
            intent, early = _decided_late(draft, owner, intent)
            regretted |= early
        _plan_deployment(draft, owner, intent)
        # Whoever loses a replica is less important, so that its turn is still to come; it had one until now.
        for victim in sorted(draft.preemptions.keys() - queued):
            _sort(draft, victim)
            heappush(queue, _rank(draft, victim, living=True))
            queued.add(victim)
    return regretted


def _lives(draft: Draft, key: str) -> bool:
    return any(each.result in _LIVING for each in draft.members[key])


def _rank(draft: Draft, key: str, *, living: bool) -> tuple[int, bool, str]:
    """The order of planning: the more important first, then those without any replica, then by name.

    The first replica of a deployment is worth more than the second of another.
    """
    return -draft.books.deployments[key].priority, living, key


def _sort(draft: Draft, key: str) -> None:
    """Sorts a deployment's replicas, and frees what those hold that have ended."""
    books = draft.books
    owner = books.deployments.get(key)
    members: list[Sorted] = []
    for _, replica in sorted(books.members(key).items()):
        node = books.nodes.get(replica.node)
        each = classify(Case(replica, owner, node, draft.frozen, draft.policy, draft.now))
        if replica.replica in draft.leaving:
            each = replace(each, result=Class.DRAINING)
        members.append(each)
        if each.result in _REMOVED:
            draft.forget(each, _REMOVED[each.result])
        elif each.result is Class.DRAINING and not replica.observed and replica.drain_deadline is not None:
            draft.wake_at(key, replica.drain_deadline + draft.policy.unclaimed_grace)
    draft.members[key] = hold_pins(owner, members)[0] if owner is not None else members


def _give_up(draft: Draft, key: str) -> Intent | None:
    """Drains what a deployment wants to be rid of whatever can be placed; None for a deleted one.

    What is held back waits for the deployment's turn.
    """
    members = draft.members[key]
    owner = draft.books.deployments.get(key)
    if owner is None:
        for each in members:
            if each.result is Class.ORPHAN:
                draft.give_up(each)
        return None
    intent = intend(_owner(draft, key), draft.members[key], draft.policy)
    for each in intent.drain:
        if each.replica.replica not in draft.held:
            draft.give_up(each)
    return intent


def _owner(draft: Draft, key: str) -> DeploymentView:
    """A deployment with the launch that is to be started now: after a roll back, the one before."""
    if key not in draft.standings:
        owner, members = draft.books.deployments[key], draft.members[key]
        memory = _remembered(draft, owner)
        frozen = bool(_frozen_for(draft, members))
        settled = settle(owner, members, memory.failure, draft.now, draft.policy, frozen=frozen)
        draft.standings[key] = settled
        if settled.deployment.launch_generation != owner.launch_generation:
            owner = replace(settled.deployment, failure=memory.failure)
            draft.standings[key] = replace(settled, deployment=owner)
            _sort_again(draft, owner)
    return draft.standings[key].deployment


def _sort_again(draft: Draft, owner: DeploymentView) -> None:
    """Sorts the replicas of a deployment that goes back to an earlier launch; who leaves, leaves."""
    nodes = draft.books.nodes
    members = [
        classify(
            Case(each.replica, owner, nodes.get(each.replica.node), draft.frozen, draft.policy, draft.now)
        )
        if each.result in _LIVING
        else each
        for each in draft.members[owner.key]
    ]
    draft.members[owner.key] = hold_pins(owner, members)[0]


def _remembered(draft: Draft, deployment: DeploymentView) -> Memory:
    members = draft.members[deployment.key]
    living = [each.replica for each in members if each.result not in _REMOVED]
    failed = [each.replica for each in members if each.result is Class.FAILED]
    return remember(deployment, failed, living, draft.now, draft.policy)


def _holds_back(draft: Draft, intent: Intent) -> bool:
    return any(each.replica.replica not in draft.leaving for each in intent.drain)


def _decided_late(draft: Draft, owner: DeploymentView, first: Intent | None) -> tuple[Intent, set[str]]:
    """Gives up what a deployment can spare once it is known which of its replicas others take.

    Args:
        draft: With the replicas that it gave up and those that were taken from it.
        owner: The deployment.
        first: What it wanted before; None where nobody looked.

    Returns:
        What it wants, and the replicas that it gave up and should have kept.
    """
    wanted = first.drain if first is not None else ()
    early = {each.replica.replica: each for each in wanted if each.replica.replica not in draft.held}
    members = [early.get(each.replica.replica, each) for each in draft.members[owner.key]]
    intent = intend(owner, members, draft.policy)
    for each in intent.drain:
        if each.replica.replica not in draft.leaving:
            draft.give_up(each)
    return intent, early.keys() - {each.replica.replica for each in intent.drain}


def _plan_deployment(draft: Draft, deployment: DeploymentView, intent: Intent) -> None:
    members = draft.members[deployment.key]
    deployment = _reminded(draft, deployment, members)
    memory, settled = _remembered(draft, deployment), draft.standings[deployment.key]
    waiting = memory.failure.next_attempt if memory.failure is not None else None
    allowed = intent.allowed if waiting is None else min(intent.allowed, memory.at_once)
    assigner = Assigner(draft, deployment, members, intent, memory)
    assigned = assigner.assign(allowed)
    yielded: Sorted | None = None
    if assigned.explanation is not None and not assigned.reservations and assigned.placed < allowed:
        yielded = _yielding(intent, assigner, assigned, members)
        if yielded is not None:
            draft.give_up(yielded)
    draft.wake_at(deployment.key, waiting, memory.forget_at, settled.wake_at)
    draft.conclusions.append(
        conclude(
            deployment,
            Outcome(
                members=tuple(members),
                missing=intent.missing - assigned.placed,
                placed=assigned.placed,
                explanation=assigned.explanation,
                yielded=yielded,
                failure=memory.failure,
                frozen=_frozen_for(draft, members),
                settled=settled,
                coming=assigned.coming,
                reservations=tuple(assigned.reservations),
                preemption=draft.preemptions.get(deployment.key, deployment.preemption),
            ),
        )
    )


def _reminded(draft: Draft, deployment: DeploymentView, members: Iterable[Sorted]) -> DeploymentView:
    """The deployment with a loss that its own record may not tell of.

    The order to make room is written with the record of who pre-empts. Where the loser's record met a
    conflict, its replicas on their way out are what reminds of it.
    """
    if deployment.preemption is not None:
        return deployment
    for each in members:
        replica = each.replica
        by = draft.books.deployments.get(replica.preempted_by)
        if by is not None and replica.uid == deployment.uid:
            lost = Preemption(by.key, by.priority, replica.replica, replica.node, draft.now)
            return replace(deployment, preemption=lost)
    return deployment


def _frozen_for(draft: Draft, members: Iterable[Sorted]) -> str:
    """The freeze, where it concerns replicas of this deployment."""
    nodes = draft.books.nodes
    held = any(
        each.replica.node in nodes and nodes[each.replica.node].state is not NodeState.READY
        for each in members
        if each.result in _LIVING
    )
    return draft.frozen if held else ""


def _yielding(
    intent: Intent, assigner: Assigner, assigned: Assigned, members: Sequence[Sorted]
) -> Sorted | None:
    """A serving replica that may go first because its successor fits nowhere else.

    It is given up only if its room is what the successor lacks: emptying a node that nothing can replace
    must not end the service.
    """
    if any(each.result is Class.DRAINING for each in members):
        # Room is on its way already.
        return None
    for each in intent.yielding:
        if assigner.fits_without(each.replica, assigned.blocked):
            return Sorted(each.replica, each.result, f"{each.why}, and its successor needs its room")
    return None
