"""What should change, and where: a pure function from a snapshot of the cluster to a plan.

`plan(snapshot, now, new_replica_id)` decides; nothing here reads a clock, the store or the network. The
words are defined in `structs`, the stages in `reconcile` (what) and `place` (where), the reasons in
`explain`.
"""

from controlplane.scheduler.explain import Explanation, NodeVerdict, explain_deployment
from controlplane.scheduler.planner import Planner, plan
from controlplane.scheduler.rollout import effective
from controlplane.scheduler.structs import (
    Claim,
    Conclusion,
    Condition,
    DeploymentView,
    DeviceView,
    Drain,
    EngineView,
    Failure,
    Launch,
    Limits,
    Need,
    NodeView,
    Pin,
    Place,
    Plan,
    Policy,
    Preemption,
    Progress,
    Quota,
    Remove,
    ReplicaView,
    Reservation,
    Snapshot,
    Taint,
    Toleration,
    Truth,
)

__all__ = [
    "Claim",
    "Conclusion",
    "Condition",
    "DeploymentView",
    "DeviceView",
    "Drain",
    "EngineView",
    "Explanation",
    "Failure",
    "Launch",
    "Limits",
    "Need",
    "NodeVerdict",
    "NodeView",
    "Pin",
    "Place",
    "Plan",
    "Planner",
    "Policy",
    "Preemption",
    "Progress",
    "Quota",
    "Remove",
    "ReplicaView",
    "Reservation",
    "Snapshot",
    "Taint",
    "Toleration",
    "Truth",
    "effective",
    "explain_deployment",
    "plan",
]
