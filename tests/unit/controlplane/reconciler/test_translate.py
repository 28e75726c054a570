from dataclasses import replace
from datetime import UTC, datetime

from google.protobuf.struct_pb2 import Struct
from millrace.core.v1 import deployment_pb2, node_pb2, replica_pb2, sizing_pb2, types_pb2
from millrace.state.v1 import records_pb2

from controlplane.reconciler import View, build_snapshot
from controlplane.reconciler.loop import new_replica_id
from controlplane.reconciler.snapshot import follow
from controlplane.reconciler.translate import OPERATIONS_MAX, Transaction, translate
from controlplane.scheduler import (
    Claim,
    Conclusion,
    Condition,
    Drain,
    Plan,
    Planner,
    Reservation,
    Truth,
    plan,
)
from core.store import Put, keys
from core.store.checks import MAXIMUM_OPERATIONS

NOW = datetime(2030, 1, 1, tzinfo=UTC)


def view_of(*, replicas: int, **extra_args: float) -> View:
    arguments = Struct()
    arguments.update(extra_args)
    spec = deployment_pb2.DeploymentSpec(
        model="m", engine=types_pb2.ENGINE_SIMULATOR, replicas=replicas, extra_args=arguments
    )
    record = records_pb2.DeploymentRecord(
        namespace="team",
        name="qwen",
        uid="uid",
        generation=1,
        launch_generation=1,
        spec=spec,
        sizing=sizing_pb2.Sizing(
            total_bytes=1,
            device_count=1,
            kv_cache_bytes=99,
            device_kinds=[types_pb2.DEVICE_KIND_CPU],
        ),
    )
    inventory = node_pb2.NodeInventory(
        node="node-1",
        devices=[node_pb2.Device(id="cpu", kind=types_pb2.DEVICE_KIND_CPU, memory_bytes=1 << 40)],
        engines=[
            node_pb2.EngineEnvironment(
                engine=types_pb2.ENGINE_SIMULATOR, device_kinds=[types_pb2.DEVICE_KIND_CPU]
            )
        ],
    )
    node = records_pb2.NodeObservationRecord(inventory=inventory, state=types_pb2.NODE_STATE_READY)
    return View(
        deployments={keys.spec_deployment("team", "qwen"): record},
        nodes={keys.actual_node("node-1"): node},
        revisions=lambda key: 7 if key.startswith(keys.SPEC_DEPLOYMENTS) else 0,
    )


def transactions_of(view: View) -> list[Transaction]:
    made = plan(build_snapshot(view), NOW, new_replica_id)
    return translate(made, view, now=NOW, fencing_token=5)


def test_many_replicas_are_written_in_several_transactions_that_the_store_takes() -> None:
    transactions = transactions_of(view_of(replicas=250))
    assert [len(each.operations) for each in transactions] == [OPERATIONS_MAX, OPERATIONS_MAX, 51]
    for each in transactions:
        # One more condition, the leader's, is added at commit.
        assert len(each.compares) < MAXIMUM_OPERATIONS
        assert each.compares[0].key == keys.spec_deployment("team", "qwen")
        assert each.compares[0].mod_revision == 7
        assert {compare.key for compare in each.compares[1:]} == {
            operation.key for operation in each.operations
        }


def launched(view: View) -> replica_pb2.LaunchSpec:
    (transaction,) = transactions_of(view)
    (order,) = [
        replica_pb2.ReplicaAssignment.FromString(operation.value)
        for operation in transaction.operations
        if isinstance(operation, Put) and operation.key.startswith(keys.PLAN_REPLICAS)
    ]
    return order.launch


def test_an_explicit_share_of_the_device_leaves_the_cache_to_the_engine() -> None:
    assert launched(view_of(replicas=1)).kv_cache_bytes == 99
    assert launched(view_of(replicas=1, gpu_memory_utilization=0.5)).kv_cache_bytes == 0


def test_who_makes_room_and_for_whom_it_is_kept_are_one_transaction() -> None:
    view = view_of(replicas=0)
    urgent = records_pb2.DeploymentRecord(namespace="lab", name="urgent", uid="u", generation=1)
    assignment = replica_pb2.ReplicaAssignment(
        namespace="team", deployment="qwen", replica="qwen-1", deployment_uid="uid", node="node-1"
    )
    view = replace(
        view,
        deployments={**view.deployments, keys.spec_deployment("lab", "urgent"): urgent},
        assignments={keys.plan_replica("team", "qwen", "qwen-1"): assignment},
    )
    good = Condition(Truth.TRUE, "Placed", "")
    kept = Reservation("node-1", (Claim("cpu", 1),), ("qwen-1",), NOW)
    made = Plan(
        drain=(Drain("qwen-1", "team/qwen", NOW, "why", preempted_by="lab/urgent"),),
        conclusions=(
            Conclusion("lab/urgent", good, good, pending=1, reservations=(kept,)),
            Conclusion("team/qwen", good, good),
        ),
    )
    ordered = translate(made, view, now=NOW, fencing_token=5)
    transactions = {each.deployment: each for each in ordered}
    both = transactions["lab/urgent"]
    assert {each.key for each in both.operations} == {
        keys.plan_deployment("lab", "urgent"),
        keys.plan_replica("team", "qwen", "qwen-1"),
    }
    guards = {each.key for each in both.compares}
    assert {keys.spec_deployment("lab", "urgent"), keys.spec_deployment("team", "qwen")} <= guards
    assert [each.reason for each in both.notices] == ["Preempted"]
    assert keys.plan_replica("team", "qwen", "qwen-1") not in {
        each.key for each in transactions["team/qwen"].operations
    }
    assert [(each.deployment, each.rests_on) for each in ordered] == [
        ("lab/urgent", frozenset()),
        ("team/qwen", frozenset({"lab/urgent"})),
    ]


def test_following_changes_leads_to_the_books_of_a_whole_snapshot() -> None:
    view = view_of(replicas=2)
    first = Planner()
    everything = [*view.deployments, *view.nodes, keys.plan_replica("team", "gone", "gone-1")]
    assert follow(first.books, view, everything) == {"team/qwen", "team/gone"}
    second = Planner()
    second.books.load(build_snapshot(view))
    assert (first.books.deployments, first.books.nodes) == (second.books.deployments, second.books.nodes)
    plans = [planner.plan(NOW, lambda key: f"{key}-new") for planner in (first, second)]
    assert plans[0] == plans[1]
    follow(first.books, replace(view, nodes={}), list(view.nodes))
    assert not first.books.nodes


def test_nothing_to_do_is_no_transaction() -> None:
    assert transactions_of(View()) == []


def test_replica_identifiers_are_readable_and_different() -> None:
    made = {new_replica_id("team/qwen.v2") for _ in range(100)}
    assert len(made) == 100
    assert all(each.startswith("qwen.v2-") and len(each) == len("qwen.v2-") + 10 for each in made)
    assert all(each == each.lower() for each in made)
