from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from controlplane.scheduler import DeploymentView, Need, NodeView, Policy, ReplicaView
from controlplane.scheduler.reconcile import Case, Class, classify, frozen_reason, surplus_order
from core.states import Engine, NodeState, ReplicaState

NOW = datetime(2030, 1, 1, tzinfo=UTC)
OWNER = DeploymentView("team/qwen", "uid-1", 3, 2, 1, Need(Engine.VLLM))


def replica(**changes: Any) -> ReplicaView:
    fields: dict[str, Any] = {
        "replica": "qwen-a",
        "deployment": "team/qwen",
        "uid": "uid-1",
        "generation": 2,
        "node": "node-1",
        "claims": (),
        "draining": False,
        "state": ReplicaState.READY,
        "created": NOW,
        "observed": True,
    }
    return ReplicaView(**(fields | changes))


def node(state: NodeState = NodeState.READY, **changes: Any) -> NodeView:
    return NodeView("node-1", state, **changes)


PAST = NOW - timedelta(seconds=31)


@pytest.mark.parametrize(
    ("one", "owner", "machine", "frozen", "expected"),
    [
        (replica(), OWNER, node(), "", Class.CURRENT),
        (replica(state=ReplicaState.ASSIGNED, observed=False), OWNER, node(), "", Class.CURRENT),
        (replica(state=ReplicaState.STOPPED), OWNER, node(), "", Class.ENDED),
        (replica(state=ReplicaState.PREEMPTED), OWNER, node(), "", Class.ENDED),
        (replica(state=ReplicaState.FAILED), OWNER, node(), "", Class.FAILED),
        (replica(state=ReplicaState.FAILED, draining=True), OWNER, node(), "", Class.ENDED),
        (replica(state=ReplicaState.FAILED), None, node(), "", Class.ENDED),
        (replica(state=ReplicaState.FAILED, uid="uid-0"), OWNER, node(), "", Class.ENDED),
        (replica(), OWNER, node(NodeState.LOST), "", Class.LOST),
        (replica(), OWNER, node(NodeState.LOST), "too many", Class.CURRENT),
        (replica(), OWNER, node(NodeState.SILENT), "", Class.CURRENT),
        (replica(), OWNER, None, "", Class.CURRENT),
        (replica(state=ReplicaState.LOST), OWNER, node(), "", Class.LOST),
        (replica(draining=True), OWNER, node(), "", Class.DRAINING),
        (replica(draining=True), None, node(), "", Class.DRAINING),
        (replica(draining=True, observed=False, drain_deadline=PAST), OWNER, node(), "", Class.ENDED),
        (replica(draining=True, observed=True, drain_deadline=PAST), OWNER, node(), "", Class.DRAINING),
        (replica(draining=True, observed=False, drain_deadline=NOW), OWNER, node(), "", Class.DRAINING),
        (replica(), None, node(), "", Class.ORPHAN),
        (replica(uid="uid-0"), OWNER, node(), "", Class.ORPHAN),
        (replica(external_url="http://gone"), OWNER, node(), "", Class.ORPHAN),
        (replica(), OWNER, node(draining=True), "", Class.STALE),
        (replica(), OWNER, node(cordoned=True), "", Class.CURRENT),
        (replica(generation=1), OWNER, node(), "", Class.STALE),
    ],
)
def test_the_first_rule_that_holds_wins(
    one: ReplicaView, owner: DeploymentView | None, machine: NodeView | None, frozen: str, expected: Class
) -> None:
    found = classify(Case(one, owner, machine, frozen, Policy(), NOW))
    assert found.result is expected
    assert found.why


@pytest.mark.parametrize(
    ("states", "is_frozen"),
    [
        ("R", False),
        ("S", True),
        ("L", True),
        ("RL", False),
        ("LL", True),
        ("RRL", False),
        ("RRLL", True),
        ("RRRRRRLL", False),
        ("RRRRRRRLLL", False),
        ("RRRRRRSLLL", True),
    ],
)
def test_many_silent_nodes_freeze_one_among_others_does_not(states: str, *, is_frozen: bool) -> None:
    kinds = {"R": NodeState.READY, "S": NodeState.SILENT, "L": NodeState.LOST}
    nodes = {f"n{index}": NodeView(f"n{index}", kinds[each]) for index, each in enumerate(states)}
    assert bool(frozen_reason(nodes, nodes, Policy())) is is_frozen


def test_lost_nodes_that_hold_nothing_are_forgotten() -> None:
    nodes = {name: NodeView(name, NodeState.LOST) for name in ("a", "b", "c")}
    nodes["d"] = NodeView("d", NodeState.READY)
    assert not frozen_reason(nodes, (), Policy())


def test_what_does_not_serve_is_given_up_first_then_the_newest() -> None:
    late = NOW + timedelta(seconds=5)
    members = [
        replica(replica="old"),
        replica(replica="new", created=late),
        replica(replica="sick", healthy=False),
        replica(replica="starting", state=ReplicaState.STARTING),
    ]
    assert [each.replica for each in sorted(members, key=surplus_order)] == ["starting", "sick", "new", "old"]
