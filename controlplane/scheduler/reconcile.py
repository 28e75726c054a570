"""WHAT should change: sorts replicas by an ordered rule table.

In comes a snapshot, out comes each replica's class with the why. The first rule that holds wins. Where
a missing replica could go is the next stage's question; nothing here looks at free memory.
"""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from enum import Enum

from controlplane.scheduler.structs import DeploymentView, NodeView, Policy, ReplicaView, Snapshot
from core.states import NodeState, ReplicaState


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
        lambda case: case.owner is not None and case.replica.generation != case.owner.launch_generation,
        Class.STALE,
        lambda _: "the spec has changed",
    ),
    Rule(lambda _: True, Class.CURRENT, lambda _: "it is as it should be"),
)


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


def classify_all(snapshot: Snapshot, now: datetime, policy: Policy, frozen: str) -> list[Sorted]:
    """Sorts every replica, in the order of their identifiers."""
    return [
        classify(
            Case(
                replica=replica,
                owner=snapshot.deployments.get(replica.deployment),
                node=snapshot.nodes.get(replica.node),
                frozen=frozen,
                policy=policy,
                now=now,
            )
        )
        for _, replica in sorted(snapshot.replicas.items())
    ]


def frozen_reason(snapshot: Snapshot, policy: Policy) -> str:
    """Why nothing is rescheduled off silent nodes; empty when it may be.

    Lost nodes that hold no replica are left out: their replicas have been replaced, and a machine that
    was given away must not count for ever.
    """
    holding = {replica.node for replica in snapshot.replicas.values()}
    known = [
        node for node in snapshot.nodes.values() if node.state is not NodeState.LOST or node.name in holding
    ]
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
