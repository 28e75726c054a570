"""Back-off of failures, as data: what is remembered of them and when to try again.

In come the failed replicas of a deployment and what was remembered before, out comes the new memory. A
replica that had served is replaced at once, unless it keeps failing soon after it became ready: without
that exception a crash loop would start engines as fast as they die.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta

from controlplane.scheduler.structs import DeploymentView, Failure, Policy, ReplicaView

# Above this exponent every back-off has long reached its maximum.
_EXPONENT_MAX = 32


@dataclass(frozen=True, slots=True)
class Memory:
    """What is remembered of a deployment's failures.

    Attributes:
        failure: The last one; None where it is over.
        at_once: Replacements that need not wait for the back-off.
        forget_at: When time alone ends the memory; None when it cannot.
    """

    failure: Failure | None
    at_once: int = 0
    forget_at: datetime | None = None


def remember(
    deployment: DeploymentView,
    failed: Sequence[ReplicaView],
    living: Iterable[ReplicaView],
    now: datetime,
    policy: Policy,
) -> Memory:
    """Works out what to remember after this look at the replicas.

    Args:
        deployment: With what was remembered before.
        failed: Its replicas that have failed and are about to be forgotten.
        living: Its other replicas.
        now: The present.
        policy: Bounds.
    """
    failure = deployment.failure
    if deployment.generation != deployment.observed_generation or deployment.desired == 0:
        # Someone has changed the spec: that is a reason to try at once.
        failure = None
    if failure is not None and failure.generation not in {0, deployment.launch_generation}:
        # Another launch's: it is told until the present one has proved itself, and delays nothing.
        failure = replace(failure, next_attempt=None)
    at_once = 0
    for replica in sorted(failed, key=lambda each: (each.state_time or now, each.replica)):
        if replica.generation != deployment.launch_generation:
            # It is to be replaced anyway; its failure says nothing about the new spec.
            continue
        failure, immediate = _after(failure, replica, now, policy)
        at_once += immediate
    if failure is None:
        return Memory(None)
    if failure.next_attempt is not None and failure.next_attempt <= now:
        failure = replace(failure, next_attempt=None)
    # Agents' clocks may lag behind ours, by which the failure is stamped: a replica that we placed after
    # the failure became ready after it, whatever its agent's clock says.
    since = [
        max(replica.created, replica.ready_time)
        for replica in living
        if replica.serves and replica.ready_time is not None
    ]
    moments = [moment + policy.stable for moment in since if moment >= failure.time]
    forget_at = min(moments, default=None)
    if forget_at is not None and forget_at <= now:
        return Memory(None, at_once)
    return Memory(failure, at_once, forget_at)


def _after(
    previous: Failure | None, replica: ReplicaView, now: datetime, policy: Policy
) -> tuple[Failure, int]:
    """Adds one failure; also returns how many replacements it allows at once."""
    if previous is not None and previous.generation not in {0, replica.generation}:
        previous = None
    served = replica.ready_time is not None
    ended = replica.state_time or now
    stable = replica.ready_time is not None and ended - replica.ready_time >= policy.stable
    waiting = previous is not None and previous.next_attempt is not None and previous.next_attempt > now
    consecutive, next_attempt, at_once = 1, None, 0
    if previous is not None and waiting and (stable or not served):
        # Replicas that were started together fail together: the wave counts once. One that had served
        # well is replaced at once all the same.
        consecutive, next_attempt, at_once = previous.consecutive, previous.next_attempt, int(stable)
    elif not stable:
        consecutive = 1 + (previous.consecutive if previous is not None else 0)
        exponent = consecutive - 2 if served else consecutive - 1
        if exponent >= 0:
            next_attempt = now + min(
                timedelta(seconds=2 ** min(exponent, _EXPONENT_MAX)), policy.back_off_max
            )
    found = Failure(
        replica=replica.replica,
        node=replica.node,
        message=replica.message or "the engine ended by itself",
        time=now,
        consecutive=consecutive,
        next_attempt=next_attempt,
        generation=replica.generation,
    )
    return found, at_once
