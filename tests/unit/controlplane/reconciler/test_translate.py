from datetime import UTC, datetime

from google.protobuf.struct_pb2 import Struct
from millrace.core.v1 import deployment_pb2, node_pb2, replica_pb2, sizing_pb2, types_pb2
from millrace.state.v1 import records_pb2

from controlplane.reconciler import View, build_snapshot
from controlplane.reconciler.loop import new_replica_id
from controlplane.reconciler.translate import OPERATIONS_MAX, Transaction, translate
from controlplane.scheduler import plan
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


def test_nothing_to_do_is_no_transaction() -> None:
    assert transactions_of(View()) == []


def test_replica_identifiers_are_readable_and_different() -> None:
    made = {new_replica_id("team/qwen.v2") for _ in range(100)}
    assert len(made) == 100
    assert all(each.startswith("qwen.v2-") and len(each) == len("qwen.v2-") + 10 for each in made)
    assert all(each == each.lower() for each in made)
