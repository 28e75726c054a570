"""Priority, placement, labels, taints, quotas and dry runs, as users and operators say them."""

from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio
from google.protobuf.field_mask_pb2 import FieldMask
from millrace.core.v1 import deployment_pb2, node_pb2, policy_pb2, replica_pb2, types_pb2
from millrace.scheduler.v1 import scheduler_service_pb2 as messages
from millrace.state.v1 import records_pb2

from core.errors import FailedPrecondition, InvalidArgument
from core.store import Put, keys
from tests.support.api_harness import ApiHarness, declared, running_api, struct

GIB = 1 << 30


@pytest_asyncio.fixture
async def api() -> AsyncIterator[ApiHarness]:
    async with running_api() as harness:
        yield harness


def placed(**fields: Any) -> policy_pb2.Placement:
    return policy_pb2.Placement(**fields)


def pin(node: str, *devices: str) -> policy_pb2.DevicePin:
    return policy_pb2.DevicePin(node=node, device_ids=devices)


BAD_INPUT: list[tuple[str, dict[str, Any], str, str]] = [
    ("too low", {"priority": 0}, "models[0].priority", "give 1 (least important) to 10"),
    ("too high", {"priority": 11}, "models[0].priority", "out of range"),
    (
        "label key",
        {"placement": placed(node_selector={"zo ne": "x"})},
        "models[0].placement.node_selector",
        "`zo ne` is no label key",
    ),
    (
        "label value",
        {"placement": placed(node_selector={"zone": "-"})},
        "models[0].placement.node_selector.zone",
        "`-` is no label value",
    ),
    (
        "toleration",
        {"placement": placed(tolerations=[policy_pb2.Toleration(value="x")])},
        "models[0].placement.tolerations[0].key",
        "no label key",
    ),
    (
        "empty pin",
        {"placement": placed(device_pins=[pin("node-1")])},
        "models[0].placement.device_pins[0].device_ids",
        "is empty",
    ),
    (
        "same pin twice",
        {"placement": placed(device_pins=[pin("node-1", "cpu"), pin("node-1", "cpu")])},
        "models[0].placement.device_pins[1]",
        "device_pins[0]",
    ),
    (
        "unknown node",
        {"placement": placed(device_pins=[pin("nowhere", "cpu")])},
        "models[0].placement.device_pins[0].node",
        "there is no node `nowhere`",
    ),
    (
        "unknown device",
        {"placement": placed(device_pins=[pin("node-1", "gpu-7")])},
        "models[0].placement.device_pins[0].device_ids",
        "node `node-1` has no device `gpu-7`; it has `cpu`",
    ),
    (
        "several machines",
        {"extra_args": {"nnodes": 2}},
        "models[0].extra_args.nnodes",
        "node agents cannot start yet",
    ),
]


@pytest.mark.parametrize(("fields", "field", "words"), [each[1:] for each in BAD_INPUT], ids=lambda _: "")
async def test_bad_placement_is_named(
    api: ApiHarness, fields: dict[str, Any], field: str, words: str
) -> None:
    await api.add_node()
    request = messages.DeclareDeploymentsRequest(models=[declared("a", **fields)], namespace="team")
    error = await api.refusal("DeclareDeployments", request)
    assert isinstance(error, InvalidArgument)
    assert [each.field for each in error.violations] == [field]
    assert words in error.message
    assert not (await api.store.list(keys.SPEC_DEPLOYMENTS)).items


async def test_priority_and_placement_change_in_place(api: ApiHarness) -> None:
    await api.add_node()
    await api.declare("a")
    spec = deployment_pb2.DeploymentSpec(priority=9, placement=placed(node_selector={"zone": "north"}))
    request = messages.UpdateDeploymentRequest(namespace="team", name="a", spec=spec)
    changed = (await api.call("UpdateDeployment", request)).deployment
    assert (changed.generation, changed.spec.priority) == (2, 9)
    record = records_pb2.DeploymentRecord.FromString(
        (await api.store.list(keys.spec_deployments("team"))).items[0].value
    )
    assert record.launch_generation == 1, "no engine is started anew"
    restarted = messages.UpdateDeploymentRequest(
        namespace="team", name="a", spec=deployment_pb2.DeploymentSpec(extra_args=struct({"x": 1}))
    )
    await api.call("UpdateDeployment", restarted)
    item = (await api.store.list(keys.spec_deployments("team"))).items[0]
    assert records_pb2.DeploymentRecord.FromString(item.value).launch_generation == 2


async def set_quota(api: ApiHarness, **quota: int) -> None:
    spec = policy_pb2.NamespaceSpec(quota=policy_pb2.Quota(**quota))
    record = records_pb2.NamespaceRecord(namespace="team", spec=spec)
    commit = await api.store.commit([Put(keys.spec_namespace("team"), record.SerializeToString())])
    await api.view.namespaces.wait_for_revision(commit.revision, 5)


async def test_what_a_quota_could_never_hold_is_refused(api: ApiHarness) -> None:
    await api.add_node()
    await set_quota(api, replicas=2)
    many = messages.DeclareDeploymentsRequest(models=[declared("a", replicas=3)], namespace="team")
    error = await api.refusal("DeclareDeployments", many)
    assert isinstance(error, FailedPrecondition)
    assert error.reason == "ERROR_REASON_QUOTA_EXCEEDED"
    assert error.metadata["field"] == "models[0].replicas"
    assert "it asks for 3 replicas, and the quota of team is 2" in error.message
    await set_quota(api, devices=0)
    none = messages.DeclareDeploymentsRequest(models=[declared("a")], namespace="team")
    assert "one replica needs 1 devices" in (await api.refusal("DeclareDeployments", none)).message
    await set_quota(api, replicas=2)
    await api.declare("a")
    scaled = messages.ScaleDeploymentRequest(namespace="team", name="a", replicas=3)
    assert (await api.refusal("ScaleDeployment", scaled)).reason == "ERROR_REASON_QUOTA_EXCEEDED"
    await api.call("ScaleDeployment", messages.ScaleDeploymentRequest(namespace="team", name="a", replicas=2))


async def test_labels_and_taints_are_replaced_whole(api: ApiHarness) -> None:
    await api.add_node()
    taint = policy_pb2.Taint(key="dedicated", value="lab", effect=types_pb2.TAINT_EFFECT_NO_SCHEDULE)
    spec = node_pb2.NodeSpec(labels={"zone": "north"}, taints=[taint])
    node = (await api.call("UpdateNode", messages.UpdateNodeRequest(name="node-1", spec=spec))).node
    assert (dict(node.spec.labels), list(node.spec.taints)) == ({"zone": "north"}, [taint])
    await api.call("CordonNode", messages.CordonNodeRequest(name="node-1", cordoned=True))
    cleared = messages.UpdateNodeRequest(name="node-1", update_mask=FieldMask(paths=["taints"]))
    node = (await api.call("UpdateNode", cleared)).node
    assert (dict(node.spec.labels), list(node.spec.taints)) == ({"zone": "north"}, [])
    assert node.spec.cordoned
    wrong = messages.UpdateNodeRequest(
        name="node-1", spec=node_pb2.NodeSpec(taints=[policy_pb2.Taint(key="a b")], draining=True)
    )
    error = await api.refusal("UpdateNode", wrong)
    assert isinstance(error, InvalidArgument)
    assert [each.field for each in error.violations] == [
        "update_mask",
        "spec.taints[0].key",
        "spec.taints[0].effect",
    ]


async def run(api: ApiHarness, name: str, *, memory_bytes: int) -> str:
    """Has a declared deployment hold memory on node-1."""
    item = await api.store.get(keys.spec_deployment("team", name))
    assert item is not None
    record = records_pb2.DeploymentRecord.FromString(item.value)
    assignment = replica_pb2.ReplicaAssignment(
        namespace="team",
        deployment=name,
        deployment_uid=record.uid,
        replica=f"{name}-1",
        generation=1,
        node="node-1",
        devices=[replica_pb2.DeviceClaim(device_id="cpu", memory_bytes=memory_bytes)],
        desired_state=types_pb2.REPLICA_STATE_READY,
    )
    key = keys.plan_replica("team", name, assignment.replica)
    commit = await api.store.commit([Put(key, assignment.SerializeToString())])
    await api.view.assignments.wait_for_revision(commit.revision, 5)
    return assignment.replica


async def plan(api: ApiHarness, **fields: Any) -> messages.PlannedDeployment:
    request = messages.PlanDeploymentsRequest(models=[declared("new", **fields)], namespace="team")
    response: messages.PlanDeploymentsResponse = await api.call("PlanDeployments", request)
    (planned,) = response.deployments
    return planned


async def test_a_dry_run_says_where_and_writes_nothing(api: ApiHarness) -> None:
    await api.add_node()
    before = (await api.store.list(keys.ROOT)).revision
    planned = await plan(api, replicas=2)
    assert not planned.exists
    assert [each.node for each in planned.replicas] == ["node-1", "node-1"]
    assert planned.replicas[0].devices[0].device_id == "cpu"
    assert planned.replicas[0].message.endswith(", in environment cpu")
    assert planned.replicas[0].devices[0].memory_bytes == planned.sizing.total_bytes
    assert planned.pending_replicas == 0
    assert (await api.store.list(keys.ROOT)).revision == before


async def test_a_dry_run_names_whom_it_would_pre_empt(api: ApiHarness) -> None:
    await api.add_node(memory_bytes=16 * GIB)
    await api.declare("old")
    victim = await run(api, "old", memory_bytes=15 * GIB)
    waits = await plan(api)
    assert (len(waits.replicas), waits.pending_replicas) == (0, 1)
    assert "1 out of memory" in waits.message
    urgent = await plan(api, priority=8)
    (replica,) = urgent.replicas
    assert (replica.node, list(replica.preempts)) == ("node-1", [f"team/old/{victim}"])
    assert urgent.pending_replicas == 0
    explained = await api.call(
        "ExplainDeployment", messages.ExplainDeploymentRequest(namespace="team", name="old")
    )
    assert explained.nodes


async def test_a_dry_run_of_a_name_that_exists_is_an_update(api: ApiHarness) -> None:
    await api.add_node()
    await api.declare("new")
    await run(api, "new", memory_bytes=GIB)
    planned = await plan(api)
    assert planned.exists
    assert planned.replicas, "a model in place of a simulator needs a new engine"
