"""What to tell users: the Scheduled and Available conditions of a deployment, each with its why.

In comes the outcome of planning one deployment, out comes a `Conclusion`. The texts depend on nothing
that changes by itself, so that an unchanged cluster gives unchanged conclusions.
"""

from dataclasses import dataclass

from controlplane.scheduler.explain import Explanation
from controlplane.scheduler.reconcile import Class, Sorted
from controlplane.scheduler.structs import Conclusion, Condition, DeploymentView, Failure, Truth

PLACED = "Placed"
STOPPED = "Stopped"
UNSCHEDULABLE = "Unschedulable"
BACK_OFF = "BackOff"
FROZEN = "ReschedulingFrozen"
WAITING = "WaitingForRoom"
ROLLING = "RollingUpdate"
SERVING = "Serving"
NOT_SERVING = "NoReplicaServes"


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
    """

    members: tuple[Sorted, ...]
    missing: int
    placed: int
    explanation: Explanation | None
    yielded: Sorted | None
    failure: Failure | None
    frozen: str


def conclude(deployment: DeploymentView, outcome: Outcome) -> Conclusion:
    """Puts the outcome into words."""
    return Conclusion(
        deployment=deployment.key,
        scheduled=_scheduled(deployment, outcome),
        available=_available(deployment, outcome),
        failure=outcome.failure,
        pending=outcome.missing,
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
    return _unplaced(desired, outcome)


def _unplaced(desired: int, outcome: Outcome) -> Condition:
    """Why replicas are missing."""
    count = f"{outcome.missing} of {desired} {'replica' if desired == 1 else 'replicas'}"
    leaving = outcome.yielded is not None or any(each.result is Class.DRAINING for each in outcome.members)
    if outcome.explanation is not None and leaving:
        message = f"waiting for a draining replica's room: {outcome.explanation.summary}"
        return Condition(Truth.FALSE, WAITING, message)
    if outcome.explanation is not None:
        message = f"{count} cannot be placed: {outcome.explanation.sentence}{_stuck(outcome)}"
        return Condition(Truth.FALSE, UNSCHEDULABLE, message)
    failure = outcome.failure
    if failure is not None and failure.next_attempt is not None:
        times = "once" if failure.consecutive == 1 else f"{failure.consecutive} times in a row"
        message = f"the engine has failed {times}; next attempt at {failure.next_attempt:%H:%M:%S} UTC"
        return Condition(Truth.FALSE, BACK_OFF, message)
    return Condition(Truth.TRUE, ROLLING, f"{count} are replaced one by one as others get ready")


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
