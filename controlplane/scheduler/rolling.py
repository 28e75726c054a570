"""How many replicas of one deployment to start and which to give up, before anyone asks where.

In come a deployment's sorted replicas, out comes an `Intent`. The bounds: at most `desired + surge` live
replicas, and no outdated replica that serves is given up where fewer than `desired - unavailable` others
serve. Pure arithmetic.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from controlplane.scheduler.reconcile import Class, Sorted, stale_order, surplus_order
from controlplane.scheduler.structs import DeploymentView, Policy


@dataclass(frozen=True, slots=True)
class Intent:
    """What one deployment wants.

    Attributes:
        drain: Replicas to give up now, whatever can be placed.
        missing: Replicas of the present spec that are still to be started.
        allowed: How many of them may be started now without exceeding the surge.
        yielding: Replicas that serve and could make room, in the order in which to ask them; the first
            may be given up before its successor runs, and only if that lets a successor be placed.
    """

    drain: tuple[Sorted, ...]
    missing: int
    allowed: int
    yielding: tuple[Sorted, ...] = ()


def intend(deployment: DeploymentView, members: Sequence[Sorted], policy: Policy) -> Intent:
    """Works out what a deployment wants from its live replicas."""
    current = [each for each in members if each.result is Class.CURRENT]
    stale = [each for each in members if each.result is Class.STALE]
    drain = [each for each in members if each.result is Class.ORPHAN]
    desired = deployment.desired

    surplus = sorted(current, key=lambda each: surplus_order(each.replica))[: max(0, len(current) - desired)]
    kept = [each for each in current if each not in surplus]
    drain += [
        Sorted(each.replica, Class.CURRENT, f"{desired} replicas are wanted, {len(current)} run")
        for each in surplus
    ]

    # An outdated replica that does not serve can go at once: nobody would miss it.
    idle = [each for each in stale if not each.replica.serves]
    # A URL that a successor serves already is given up before one that nobody else stands for.
    taken_over = {each.replica.external_url for each in kept if each.replica.serves}
    serving = sorted(
        (each for each in stale if each.replica.serves),
        key=lambda each: (each.replica.external_url not in taken_over, *stale_order(each.replica)),
    )
    drain += idle
    surge, unavailable = _bounds(deployment, policy)
    ready = sum(1 for each in kept if each.replica.serves) + len(serving)
    excess = min(len(serving), max(0, ready - desired))
    # A replica that only leaves its node may have nowhere to go: it goes when its successor serves.
    outdated = [each for each in serving if each.replica.generation != deployment.launch_generation]
    early = min(len(outdated), max(0, ready - desired + unavailable))
    given_up = serving[:excess] if excess >= early else outdated[:early]
    drain += given_up
    left = [each for each in serving if each not in given_up]

    missing = max(0, desired - len(kept))
    allowed = min(missing, max(0, desired + surge - len(kept) - len(left)))
    room_by_yielding = deployment.limits.unavailable is None or deployment.limits.unavailable > 0
    may_yield = missing > 0 and bool(left) and room_by_yielding and ready - len(given_up) >= desired
    return Intent(
        drain=tuple(drain),
        missing=missing,
        allowed=allowed,
        yielding=tuple(left) if may_yield else (),
    )


def _bounds(deployment: DeploymentView, policy: Policy) -> tuple[int, int]:
    """How many replicas may be above and below the wanted number."""
    limits = deployment.limits
    surge = policy.surge if limits.surge is None else limits.surge
    if limits.unavailable is not None:
        return surge, limits.unavailable
    # Without a surge nothing would ever begin.
    return surge, 0 if surge else 1
