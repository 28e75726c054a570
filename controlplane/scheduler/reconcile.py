"""WHAT should change: sorts replicas by an ordered rule table.

In comes a snapshot, out comes each replica's class with the why. The first rule that holds wins. Where
a missing replica could go is the next stage's question; nothing here looks at free memory.
"""

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from enum import Enum

from controlplane.scheduler.filters import taint_text
from controlplane.scheduler.structs import DeploymentView, NodeView, Pin, Policy, ReplicaView
from core.states import NodeState, ReplicaState, TaintEffect


class Class(Enum):
    """What a replica is to the plan."""

    ENDED = "ended"
    """Stopped as it was asked to: forget it."""
    FAILED = "failed"
    """Ended by itself: forget it, remember the failure, replace it."""
    LOST = "lost"
    """Its machine is gone: forget it and replace it."""
    DRAINING = "draining"
    """On its way out: wait."""
    ORPHAN = "orphan"
    """Nobody wants it any more: drain it."""
    STALE = "stale"
    """Serves, but is to be replaced: by a newer spec, or because its node is emptied."""
    CURRENT = "current"
    """As it should be."""


@dataclass(frozen=True, slots=True)
class Case:
    """One replica with everything that a rule may look at."""

    replica: ReplicaView
    owner: DeploymentView | None
    node: NodeView | None
    frozen: str
    policy: Policy
    now: datetime


@dataclass(frozen=True, slots=True)
class Rule:
    """A row of the table: when it holds, which class follows, and why in words."""

    holds: Callable[[Case], bool]
    result: Class
    why: Callable[[Case], str]


def _owned(case: Case) -> bool:
    return case.owner is not None and case.owner.uid == case.replica.uid


def _node_lost(case: Case) -> bool:
    if case.replica.state is ReplicaState.LOST:
        return True
    # A node that no record speaks of is unknown, which is not the same as lost.
    return case.node is not None and case.node.state is NodeState.LOST and not case.frozen


def _driving_taint(case: Case) -> str:
    """The taint that moves the replica away; empty for none."""
    if case.node is None or case.owner is None or not case.node.taints:
        return ""
    tolerations = case.owner.need.tolerations
    for taint in case.node.taints:
        if taint.effect is TaintEffect.NO_EXECUTE and not taint.tolerated_by(tolerations):
            return taint_text(taint)
    return ""


def _missing_label(case: Case) -> str:
    """A label that the deployment asks for and the node is without; empty for none."""
    if case.node is None or case.owner is None:
        return ""
    for key, value in case.owner.need.node_selector:
        if (key, value) not in case.node.labels:
            return f"{key}={value}"
    return ""


def _never_taken_up(case: Case) -> bool:
    deadline = case.replica.drain_deadline
    return (
        case.replica.draining
        and not case.replica.observed
        and deadline is not None
        and case.now >= deadline + case.policy.unclaimed_grace
    )


RULES: tuple[Rule, ...] = (
    # An ended engine holds nothing, wherever it ran.
    Rule(
        lambda case: case.replica.state in {ReplicaState.STOPPED, ReplicaState.PREEMPTED},
        Class.ENDED,
        lambda case: case.replica.message or "it has stopped",
    ),
    # A replica that was to end anyway and fails on the way is no failure of its deployment.
    Rule(
        lambda case: (
            case.replica.state is ReplicaState.FAILED and (case.replica.draining or not _owned(case))
        ),
        Class.ENDED,
        lambda _: "it ended while it was draining",
    ),
    Rule(
        lambda case: case.replica.state is ReplicaState.FAILED,
        Class.FAILED,
        lambda case: case.replica.message or "the engine ended by itself",
    ),
    # Dead is not trusted, silent is not killed: a silent node keeps its replicas until it is lost, and
    # a lost one keeps them while too many are silent at once.
    Rule(
        _node_lost,
        Class.LOST,
        lambda case: f"node {case.replica.node} has been silent for longer than the grace period",
    ),
    # No agent will ever report it: the order and its end both missed the agent.
    Rule(
        _never_taken_up,
        Class.ENDED,
        lambda _: "no agent took it up before its drain deadline",
    ),
    Rule(lambda case: case.replica.draining, Class.DRAINING, lambda _: "it is draining"),
    Rule(
        lambda case: not _owned(case),
        Class.ORPHAN,
        lambda _: "its deployment was deleted",
    ),
    Rule(
        lambda case: (
            bool(case.replica.external_url)
            and case.owner is not None
            and case.replica.external_url not in case.owner.external_urls
        ),
        Class.ORPHAN,
        lambda case: f"{case.replica.external_url} is no longer declared",
    ),
    Rule(
        lambda case: case.node is not None and case.node.draining,
        Class.STALE,
        lambda case: f"node {case.replica.node} is being drained",
    ),
    Rule(
        lambda case: bool(_driving_taint(case)),
        Class.STALE,
        lambda case: f"node {case.replica.node} has the taint {_driving_taint(case)}, which is not tolerated",
    ),
    Rule(
        lambda case: bool(_missing_label(case)),
        Class.STALE,
        lambda case: f"node {case.replica.node} is without the label {_missing_label(case)}",
    ),
    Rule(
        lambda case: case.owner is not None and case.replica.generation != case.owner.launch_generation,
        Class.STALE,
        lambda _: "the spec has changed",
    ),
    Rule(lambda _: True, Class.CURRENT, lambda _: "it is as it should be"),
)


def hold_pins(
    deployment: DeploymentView, members: Sequence["Sorted"]
) -> tuple[list["Sorted"], list[Pin], int]:
    """Compares replicas with the devices that were chosen by hand.

    Args:
        deployment: With its pins; those beyond the wanted number of replicas count for nothing.
        members: Its replicas.

    Returns:
        The replicas, those current ones in excess beside the pins made stale, the newest first; the pins
        that no current replica holds; how many current replicas stand where nobody pinned them.
    """
    pins = list(deployment.pins[: deployment.desired])
    if not pins:
        return list(members), [], sum(1 for each in members if each.result is Class.CURRENT)
    free: list[Sorted] = []
    for each in sorted(members, key=lambda each: (each.replica.created, each.replica.replica)):
        if each.result is not Class.CURRENT:
            continue
        held = pin_of(each.replica)
        pin = next((pin for pin in pins if (pin.node, frozenset(pin.device_ids)) == held), None)
        if pin is None:
            free.append(each)
        else:
            pins.remove(pin)
    room_beside = max(0, deployment.desired - len(deployment.pins[: deployment.desired]))
    excess = {each.replica.replica for each in free[room_beside:]}
    why = "devices were chosen by hand, and these are others"
    judged = [
        replace(each, result=Class.STALE, why=why) if each.replica.replica in excess else each
        for each in members
    ]
    return judged, pins, len(free) - len(excess)


def pin_of(replica: ReplicaView) -> tuple[str, frozenset[str]]:
    """Where a replica stands, as a pin would say it."""
    return replica.node, frozenset(claim.device_id for claim in replica.claims)


@dataclass(frozen=True, slots=True)
class Sorted:
    """A replica with its class and the why."""

    replica: ReplicaView
    result: Class
    why: str


def classify(case: Case) -> Sorted:
    """Sorts one replica; the last rule always holds."""
    rule = next(rule for rule in RULES if rule.holds(case))
    return Sorted(case.replica, rule.result, rule.why(case))


def frozen_reason(nodes: Mapping[str, NodeView], holding: Container[str], policy: Policy) -> str:
    """Why nothing is rescheduled off silent nodes; empty when it may be.

    Lost nodes that hold no replica are left out: their replicas have been replaced, and a machine that
    was given away must not count for ever.

    Args:
        nodes: By name.
        holding: Names of nodes that hold replicas.
        policy: Bounds.
    """
    known = [node for node in nodes.values() if node.state is not NodeState.LOST or node.name in holding]
    silent = [node for node in known if node.state is not NodeState.READY]
    if not silent or len(silent) <= policy.frozen_share * len(known):
        return ""
    if len(silent) < policy.frozen_nodes_min and len(silent) < len(known):
        return ""
    return (
        f"{len(silent)} of {len(known)} nodes are silent, more than {policy.frozen_share:.0%}: that many at "
        "once point to a fault of the network or of the control plane, so nothing is moved off them"
    )


def surplus_order(replica: ReplicaView) -> tuple[bool, bool, float, str]:
    """Sorts what to give up first to the front: not serving, then unhealthy, then the newest."""
    return (replica.serves, replica.healthy, -replica.created.timestamp(), replica.replica)


def stale_order(replica: ReplicaView) -> tuple[bool, float, str]:
    """Sorts which outdated replica to replace first: unhealthy, then the oldest."""
    return (replica.healthy, replica.created.timestamp(), replica.replica)
