"""The driver: from a snapshot to a plan, one deployment after the other, over one shared account of room.

In come a snapshot, the time and a source of replica identifiers; out comes a `Plan`. It asks `reconcile`
what each replica is, `failures` when to try again, `rolling` how many to start and give up, and `place`
where. Pure: equal arguments give equal plans, and the plan of a state in which the plan was carried out
is empty.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime

from controlplane.scheduler.conclude import Outcome, conclude
from controlplane.scheduler.explain import Explanation, explain
from controlplane.scheduler.failures import Memory, remember
from controlplane.scheduler.place import (
    Placement,
    Preferences,
    Room,
    eligible_nodes,
    find_placement,
)
from controlplane.scheduler.reconcile import Class, Sorted, classify_all, frozen_reason
from controlplane.scheduler.rolling import Intent, intend
from controlplane.scheduler.structs import (
    Conclusion,
    DeploymentView,
    Drain,
    Place,
    Plan,
    Policy,
    Remove,
    Snapshot,
)
from core.states import Engine, NodeState

NewReplicaId = Callable[[str], str]

_REMOVED = {
    Class.ENDED: "Stopped",
    Class.FAILED: "ReplicaFailed",
    Class.LOST: "NodeLost",
}


@dataclass(slots=True)
class _Draft:
    """A plan while it is being made."""

    snapshot: Snapshot
    now: datetime
    policy: Policy
    new_replica_id: NewReplicaId
    room: Room
    frozen: str = ""
    place: list[Place] = field(default_factory=list)
    drain: list[Drain] = field(default_factory=list)
    remove: list[Remove] = field(default_factory=list)
    conclusions: list[Conclusion] = field(default_factory=list)
    wake_at: list[datetime] = field(default_factory=list)


def plan(
    snapshot: Snapshot, now: datetime, new_replica_id: NewReplicaId, policy: Policy | None = None
) -> Plan:
    """Decides what to do now.

    Args:
        snapshot: The cluster.
        now: The present; aware.
        new_replica_id: Makes an identifier, unique for all time, for a new replica of a deployment.
        policy: Bounds; the defaults where it is None.
    """
    policy = policy or Policy()
    draft = _Draft(
        snapshot, now, policy, new_replica_id, Room(snapshot.nodes), frozen_reason(snapshot, policy)
    )
    members: dict[str, list[Sorted]] = {}
    for each in classify_all(snapshot, now, policy, draft.frozen):
        members.setdefault(each.replica.deployment, []).append(each)
        _take_up(draft, each)
    orphans = (
        each for key, group in sorted(members.items()) if key not in snapshot.deployments for each in group
    )
    for each in orphans:
        if each.result is Class.ORPHAN:
            _drain(draft, each)
    # Deployments without any replica come first: the first replica is worth more than the second.
    order = sorted(
        snapshot.deployments.values(),
        key=lambda view: (any(_lives(each) for each in members.get(view.key, ())), view.key),
    )
    for deployment in order:
        _plan_deployment(draft, deployment, members.get(deployment.key, []))
    future = [moment for moment in draft.wake_at if moment > now]
    return Plan(
        place=tuple(draft.place),
        drain=tuple(draft.drain),
        remove=tuple(draft.remove),
        conclusions=tuple(sorted(draft.conclusions, key=lambda each: each.deployment)),
        retry_after=min(future, default=None),
        frozen=draft.frozen,
    )


def _lives(each: Sorted) -> bool:
    return each.result in {Class.CURRENT, Class.STALE}


def _take_up(draft: _Draft, each: Sorted) -> None:
    """Books what a replica holds, or puts it among those to forget."""
    replica = each.replica
    if each.result in _REMOVED:
        draft.remove.append(Remove(replica.replica, replica.deployment, each.why, _REMOVED[each.result]))
        return
    # A draining engine holds its memory until it has stopped.
    draft.room.claim(replica.node, replica.claims)
    if each.result is Class.DRAINING and not replica.observed and replica.drain_deadline is not None:
        draft.wake_at.append(replica.drain_deadline + draft.policy.unclaimed_grace)


def _drain(draft: _Draft, each: Sorted) -> None:
    replica = each.replica
    deadline = draft.now + draft.policy.drain
    draft.drain.append(Drain(replica.replica, replica.deployment, deadline, each.why))
    if not replica.observed:
        draft.wake_at.append(deadline + draft.policy.unclaimed_grace)


def _plan_deployment(draft: _Draft, deployment: DeploymentView, members: Sequence[Sorted]) -> None:
    living = [each.replica for each in members if each.result not in _REMOVED]
    failed = [each.replica for each in members if each.result is Class.FAILED]
    memory = remember(deployment, failed, living, draft.now, draft.policy)
    intent = intend(deployment, members, draft.policy)
    for each in intent.drain:
        _drain(draft, each)
    waiting = memory.failure.next_attempt if memory.failure is not None else None
    allowed = intent.allowed if waiting is None else min(intent.allowed, memory.at_once)
    placed, explanation = _place(draft, deployment, members, intent, allowed, memory)
    yielded: Sorted | None = None
    if placed < allowed and explanation is not None:
        yielded = _yielding(draft, deployment, members, intent, memory)
        if yielded is not None:
            _drain(draft, yielded)
    for moment in (waiting, memory.forget_at):
        if moment is not None:
            draft.wake_at.append(moment)
    draft.conclusions.append(
        conclude(
            deployment,
            Outcome(
                members=tuple(members),
                missing=intent.missing - placed,
                placed=placed,
                explanation=explanation,
                yielded=yielded,
                failure=memory.failure,
                frozen=_frozen_for(draft, members),
            ),
        )
    )


def _frozen_for(draft: _Draft, members: Iterable[Sorted]) -> str:
    """The freeze, where it concerns replicas of this deployment."""
    nodes = draft.snapshot.nodes
    held = any(
        each.replica.node in nodes and nodes[each.replica.node].state is not NodeState.READY
        for each in members
        if _lives(each)
    )
    return draft.frozen if held else ""


def _preferences(draft: _Draft, members: Iterable[Sorted], memory: Memory) -> Preferences:
    counts: dict[str, int] = {}
    given_up = {each.replica for each in draft.drain}
    for each in members:
        if _lives(each) and each.replica.replica not in given_up:
            counts[each.replica.node] = counts.get(each.replica.node, 0) + 1
    return Preferences(counts, memory.failure.node if memory.failure is not None else "")


def _missing_urls(deployment: DeploymentView, members: Iterable[Sorted]) -> list[str]:
    """URLs of an external deployment that no replica of the present spec stands for."""
    held = {each.replica.external_url for each in members if each.result is Class.CURRENT}
    return [url for url in deployment.external_urls if url not in held]


def _place(
    draft: _Draft,
    deployment: DeploymentView,
    members: Sequence[Sorted],
    intent: Intent,
    allowed: int,
    memory: Memory,
) -> tuple[int, Explanation | None]:
    """Places up to `allowed` replicas; also returns why the next one could not be, if it could not."""
    if allowed == 0:
        return 0, None
    eligible = eligible_nodes(deployment.need, draft.snapshot.nodes)
    urls = _missing_urls(deployment, members)
    external = deployment.need.engine is Engine.EXTERNAL
    wanted = min(allowed, len(urls)) if external else allowed
    preferences = _preferences(draft, members, memory)
    for index in range(wanted):
        found = find_placement(deployment.need, eligible, draft.room, preferences)
        if found is None:
            why = explain(deployment.need, draft.snapshot.nodes, draft.room, preferences)
            return index, why
        draft.room.claim(found.node, found.claims)
        draft.place.append(
            Place(
                replica=draft.new_replica_id(deployment.key),
                deployment=deployment.key,
                node=found.node,
                claims=found.claims,
                why=_why(deployment, intent, preferences, found),
                external_url=urls[index] if external else "",
            )
        )
        preferences = preferences.with_replica(found.node)
    return wanted, None


def _why(deployment: DeploymentView, intent: Intent, preferences: Preferences, found: Placement) -> str:
    others = preferences.replicas_on.get(found.node, 0)
    spread = "no other replica of it there" if not others else f"{others} other of its replicas there"
    return f"{intent.missing} of {deployment.desired} replicas missing; {spread}, score {found.score:.2f}"


def _yielding(
    draft: _Draft,
    deployment: DeploymentView,
    members: Sequence[Sorted],
    intent: Intent,
    memory: Memory,
) -> Sorted | None:
    """A serving replica that may go first because its successor fits nowhere else.

    It is given up only if its room is what the successor lacks: emptying a node that nothing can replace
    must not end the service.
    """
    if any(each.result is Class.DRAINING for each in members) or any(
        each.deployment == deployment.key for each in draft.drain
    ):
        # Room is on its way already.
        return None
    preferences = _preferences(draft, members, memory)
    eligible = eligible_nodes(deployment.need, draft.snapshot.nodes)
    for each in intent.yielding:
        draft.room.release(each.replica.node, each.replica.claims)
        fits = find_placement(deployment.need, eligible, draft.room, preferences) is not None
        draft.room.claim(each.replica.node, each.replica.claims)
        if fits:
            return Sorted(each.replica, each.result, f"{each.why}, and its successor needs its room")
    return None
