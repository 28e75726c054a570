"""How far a launch generation has come, and when a rolling update is given up for the one that served before.

In come a deployment, its sorted replicas, what is remembered of failures and the time; out come the new
`Progress` and the deployment as it is to be planned: after a roll back with the launch that served last. The
spec is not touched: it stays as the user wrote it, and a change of it is the next attempt. Pure.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta

from controlplane.scheduler.reconcile import Class, Sorted
from controlplane.scheduler.structs import (
    Condition,
    DeploymentView,
    Failure,
    Policy,
    Progress,
    Truth,
)
from core.states import ReplicaState

COMPLETE = "Complete"
ROLLING_OUT = "RollingOut"
ROLLED_BACK = "RolledBack"
DEADLINE_EXCEEDED = "ProgressDeadlineExceeded"
STOPPED = "Stopped"

_LIVING = frozenset({Class.CURRENT, Class.STALE})


@dataclass(frozen=True, slots=True)
class Settled:
    """How the launch generation of a spec stands.

    Attributes:
        deployment: As it is to be planned: of the launch that is to be started now.
        progress: What to keep.
        good_generation: Launch generation that a later roll back would go back to; None where there is none.
        condition: What to tell users.
        wake_at: When time alone can change this; None when it cannot.
    """

    deployment: DeploymentView
    progress: Progress
    good_generation: int | None
    condition: Condition
    wake_at: datetime | None = None


def effective(deployment: DeploymentView) -> DeploymentView:
    """Returns the deployment with the launch that new replicas are started from.

    That is the spec's own, unless its launch generation was rolled back.
    """
    progress, good = deployment.progress, deployment.good
    if progress is None or good is None or not progress.rolled_back_reason:
        return deployment
    if progress.generation != deployment.declared_generation:
        return deployment
    return replace(
        deployment,
        launch_generation=good.generation,
        need=good.need,
        spec_launch_generation=deployment.declared_generation,
    )


def settle(
    deployment: DeploymentView,
    members: Sequence[Sorted],
    failure: Failure | None,
    now: datetime,
    policy: Policy,
    *,
    frozen: bool,
) -> Settled:
    """Works out how far the spec's launch generation has come.

    Args:
        deployment: With the progress so far.
        members: Its replicas, sorted.
        failure: What is remembered of failures after this look.
        now: The present.
        policy: Bounds, where the deployment has none of its own.
        frozen: True while rescheduling is frozen, which is no fault of the new generation.
    """
    target = deployment.declared_generation
    updated = [each for each in members if each.result in _LIVING and each.replica.generation == target]
    outdated = sum(1 for each in members if each.result in _LIVING and each.replica.generation != target)
    before = deployment.progress
    if before is None or before.generation != target:
        before = Progress(target, now)
    if before.rolled_back_reason:
        return _settled(deployment, before, updated, outdated)
    failing = failure is not None and failure.generation == target
    progress = _advanced(before, updated, now)
    served = sum(1 for each in updated if each.replica.serves)
    whole = served >= 1 and served == len(updated) and not outdated and not failing
    if progress.complete_time is None and (whole or deployment.desired == 0):
        progress = replace(progress, complete_time=now)
    if frozen and now >= progress.progress_time + _deadline(deployment, policy):
        # Nothing could be done meanwhile: the time begins anew.
        progress = replace(progress, progress_time=now)
    good = _good_generation(deployment, progress, served, now, policy, failing=failing)
    if good != target and deployment.good is not None and not frozen:
        reason = _give_up_reason(deployment, progress, failure if failing else None, now, policy)
        if reason:
            progress = replace(progress, rolled_back_reason=reason)
            deployment = effective(replace(deployment, progress=progress))
            return _settled(deployment, progress, updated, outdated)
    if deployment.desired == 0:
        condition = Condition(Truth.TRUE, STOPPED, "no replica is wanted")
    elif progress.complete_time is not None:
        condition = Condition(Truth.TRUE, COMPLETE, f"the replicas run launch generation {target}")
    else:
        condition = _under_way(deployment, progress, updated, outdated, now, policy)
    return Settled(
        deployment,
        progress,
        good,
        condition,
        _wake_at(deployment, progress, good, now, policy, frozen=frozen),
    )


def _advanced(before: Progress, updated: Sequence[Sorted], now: datetime) -> Progress:
    """Notes what has never been reached before: one more replica that serves, or one further on its way."""
    served = sum(1 for each in updated if each.replica.serves)
    furthest = max(
        (each.replica.state for each in updated if not each.replica.serves), default=ReplicaState.PENDING
    )
    if served > before.served:
        return replace(before, progress_time=now, served=served, furthest=ReplicaState.PENDING)
    if furthest > before.furthest:
        return replace(before, progress_time=now, furthest=furthest)
    return before


def _good_generation(
    deployment: DeploymentView,
    progress: Progress,
    served: int,
    now: datetime,
    policy: Policy,
    *,
    failing: bool,
) -> int | None:
    """Which launch a failed update would go back to from now on.

    The first launch that serves at all is better than none; a later one has to prove itself: engines that
    crash under their first load would otherwise count as good.
    """
    target = progress.generation
    if deployment.good is None:
        return target if served else None
    proved = (
        progress.complete_time is not None
        and served > 0
        and not failing
        and now >= progress.complete_time + policy.stable
    )
    return target if proved else deployment.good.generation


def _give_up_reason(
    deployment: DeploymentView, progress: Progress, failure: Failure | None, now: datetime, policy: Policy
) -> str:
    """Why the update has failed; empty while it has not."""
    if failure is not None and failure.consecutive >= policy.rollout_failures_max:
        return (
            f"its replicas failed {failure.consecutive} times in a row, last {failure.replica} on node "
            f"{failure.node}: {failure.message}"
        )
    if progress.complete_time is None and now >= progress.progress_time + _deadline(deployment, policy):
        seconds = _deadline(deployment, policy).total_seconds()
        why = f"; {failure.message}" if failure is not None else ""
        return f"it made no progress for {seconds:g} s with {progress.served} replicas of it ready{why}"
    return ""


def _deadline(deployment: DeploymentView, policy: Policy) -> timedelta:
    return deployment.limits.progress_deadline or policy.progress_deadline


def _under_way(
    deployment: DeploymentView,
    progress: Progress,
    updated: Sequence[Sorted],
    outdated: int,
    now: datetime,
    policy: Policy,
) -> Condition:
    served = sum(1 for each in updated if each.replica.serves)
    text = f"{served} of {deployment.desired} replicas of launch generation {progress.generation} serve"
    if outdated:
        text += f", {outdated} of earlier ones are still there"
    deadline = _deadline(deployment, policy)
    if now >= progress.progress_time + deadline:
        return Condition(
            Truth.FALSE,
            DEADLINE_EXCEEDED,
            f"{text}: no progress for {deadline.total_seconds():g} s, and no earlier launch to go back to",
        )
    return Condition(Truth.TRUE, ROLLING_OUT, text)


def _settled(
    deployment: DeploymentView, progress: Progress, updated: Sequence[Sorted], outdated: int
) -> Settled:
    """How a launch generation stands that was rolled back."""
    good = deployment.good
    generation = good.generation if good is not None else deployment.launch_generation
    kept = f"{outdated} replicas of launch generation {generation} stay"
    left = f", {len(updated)} of {progress.generation} are still to go" if updated else ""
    condition = Condition(
        Truth.FALSE,
        ROLLED_BACK,
        f"launch generation {progress.generation} was rolled back: {progress.rolled_back_reason}. "
        f"{kept}{left}; change the spec, or try it again with `millrace rollout restart`",
    )
    return Settled(deployment, progress, generation, condition)


def _wake_at(
    deployment: DeploymentView,
    progress: Progress,
    good: int | None,
    now: datetime,
    policy: Policy,
    *,
    frozen: bool,
) -> datetime | None:
    """The next moment at which time alone decides."""
    if deployment.desired == 0 or frozen:
        return None
    if progress.complete_time is None:
        moment = progress.progress_time + _deadline(deployment, policy)
    elif good != progress.generation:
        moment = progress.complete_time + policy.stable
    else:
        return None
    return moment if moment > now else None
