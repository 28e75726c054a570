"""What to tell users: the conditions of a deployment, each with its why.

In comes the outcome of planning one deployment, out comes a `Conclusion`. The texts depend on nothing
that changes by itself, so that an unchanged cluster gives unchanged conclusions.
"""

from dataclasses import dataclass

from controlplane.scheduler.explain import QUOTA_EXCEEDED, UNSCHEDULABLE, Explanation
from controlplane.scheduler.reconcile import Class, Sorted
from controlplane.scheduler.rollout import Settled
from controlplane.scheduler.structs import (
    Conclusion,
    Condition,
    DeploymentView,
    Failure,
    Preemption,
    Reservation,
    Truth,
)

PLACED = "Placed"
STOPPED = "Stopped"
PREEMPTED = "Preempted"
BACK_OFF = "BackOff"
FROZEN = "ReschedulingFrozen"
WAITING = "WaitingForRoom"
ROLLING = "RollingUpdate"
SERVING = "Serving"
NOT_SERVING = "NoReplicaServes"

UNPLACED = frozenset({UNSCHEDULABLE, QUOTA_EXCEEDED, PREEMPTED})
"""Reasons for which replicas wait until somebody changes something."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How planning one deployment went.

    Attributes:
        members: Its replicas, sorted.
        missing: Replicas that are still to be placed after this plan.
        placed: Replicas that this plan places.
        explanation: Why the next one could not be placed; None when none was refused.
        yielded: A replica that makes room for its successor; None for none.
        failure: What is remembered of failures.
        frozen: Why its replicas on silent nodes stay; empty for none.
        settled: How its launch generation stands.
        coming: True when replicas that drain already will leave the room.
        reservations: Room that is kept for its replicas.
        preemption: How it last lost a replica to a more important deployment; None for not at all.
    """

    members: tuple[Sorted, ...]
    missing: int
    placed: int
    explanation: Explanation | None
    yielded: Sorted | None
    failure: Failure | None
    frozen: str
    settled: Settled
    coming: bool = False
    reservations: tuple[Reservation, ...] = ()
    preemption: Preemption | None = None


def conclude(deployment: DeploymentView, outcome: Outcome) -> Conclusion:
    """Puts the outcome into words."""
    return Conclusion(
        deployment=deployment.key,
        scheduled=_scheduled(deployment, outcome),
        available=_available(deployment, outcome),
        failure=outcome.failure,
        pending=outcome.missing,
        progressing=outcome.settled.condition,
        progress=outcome.settled.progress,
        good_generation=outcome.settled.good_generation,
        reservations=outcome.reservations,
        # Over once it has all that it wants again.
        preemption=outcome.preemption if outcome.missing else None,
    )


def _scheduled(deployment: DeploymentView, outcome: Outcome) -> Condition:
    desired = deployment.desired
    if desired == 0:
        return Condition(Truth.TRUE, STOPPED, "no replica is wanted")
    if outcome.frozen:
        return Condition(Truth.UNKNOWN, FROZEN, outcome.frozen)
    if outcome.missing == 0:
        many = "replica is" if desired == 1 else "replicas are"
        return Condition(Truth.TRUE, PLACED, f"{desired} of {desired} {many} placed")
    return _unplaced(deployment, outcome)


def _unplaced(deployment: DeploymentView, outcome: Outcome) -> Condition:
    """Why replicas are missing."""
    desired = deployment.desired
    count = f"{outcome.missing} of {desired} {'replica' if desired == 1 else 'replicas'}"
    if outcome.reservations:
        return Condition(Truth.FALSE, WAITING, _reserved(outcome.reservations))
    draining = any(each.result is Class.DRAINING for each in outcome.members)
    leaving = outcome.yielded is not None or outcome.coming or draining
    if outcome.explanation is not None and leaving and not _lost_to_another(outcome):
        message = f"waiting for a draining replica's room: {outcome.explanation.summary}"
        return Condition(Truth.FALSE, WAITING, message)
    if outcome.explanation is not None:
        message = f"{count} cannot be placed: {outcome.explanation.sentence}{_stuck(outcome)}"
        lost = outcome.preemption
        if lost is None:
            return Condition(Truth.FALSE, outcome.explanation.reason, message)
        whom = f"{lost.replica} was pre-empted on node {lost.node} by {lost.by} (priority {lost.by_priority}"
        return Condition(Truth.FALSE, PREEMPTED, f"{whom} over {deployment.priority}); {message}")
    failure = outcome.failure
    if failure is not None and failure.next_attempt is not None:
        times = "once" if failure.consecutive == 1 else f"{failure.consecutive} times in a row"
        message = f"the engine has failed {times}; next attempt at {failure.next_attempt:%H:%M:%S} UTC"
        return Condition(Truth.FALSE, BACK_OFF, message)
    return Condition(Truth.TRUE, ROLLING, f"{count} are replaced one by one as others get ready")


def _lost_to_another(outcome: Outcome) -> bool:
    """True when what drains makes room for another deployment, which is nothing to wait for."""
    return outcome.preemption is not None


def _reserved(reservations: tuple[Reservation, ...]) -> str:
    """What is kept, and for whose end it waits."""
    victims = sum(len(each.victims) for each in reservations)
    nodes = ", ".join(sorted({each.node for each in reservations}))
    latest = max(each.deadline for each in reservations)
    kept = "1 replica" if len(reservations) == 1 else f"{len(reservations)} replicas"
    ending = "1 less important replica has" if victims == 1 else f"{victims} less important replicas have"
    when = f"at {latest:%H:%M:%S} UTC at the latest"
    return f"room for {kept} is kept on node {nodes} until {ending} ended, {when}"


def _stuck(outcome: Outcome) -> str:
    """What keeps serving meanwhile, if anything."""
    serving = sum(1 for each in outcome.members if each.result is Class.STALE and each.replica.serves)
    return f"; {serving} that should be replaced keep serving" if serving else ""


def _available(deployment: DeploymentView, outcome: Outcome) -> Condition:
    ready = sum(
        1
        for each in outcome.members
        if each.result in {Class.CURRENT, Class.STALE} and each.replica.serves and each.replica.healthy
    )
    verb = "replica serves" if deployment.desired == 1 else "replicas serve"
    message = f"{ready} of {deployment.desired} {verb}"
    if ready:
        return Condition(Truth.TRUE, SERVING, message)
    if deployment.desired == 0:
        return Condition(Truth.FALSE, STOPPED, "no replica is wanted")
    return Condition(Truth.FALSE, NOT_SERVING, message)
