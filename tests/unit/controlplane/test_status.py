import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from millrace.core.v1 import deployment_pb2, replica_pb2, types_pb2
from millrace.state.v1 import records_pb2

from controlplane.convert import desired_replicas, dict_to_struct, external_urls, struct_to_dict
from controlplane.status import deployment_status

TRUE, FALSE = types_pb2.CONDITION_STATUS_TRUE, types_pb2.CONDITION_STATUS_FALSE
READY, STARTING = types_pb2.REPLICA_STATE_READY, types_pb2.REPLICA_STATE_STARTING


def record(replicas: int = 2) -> records_pb2.DeploymentRecord:
    spec = deployment_pb2.DeploymentSpec(model="m", engine=types_pb2.ENGINE_VLLM, replicas=replicas)
    return records_pb2.DeploymentRecord(uid="uid", generation=4, launch_generation=2, spec=spec)


def concluded(
    reason: str = "Placed",
    *,
    available: bool = True,
    uid: str = "uid",
    failures: int = 0,
    waiting: bool = False,
) -> records_pb2.DeploymentPlanRecord:
    scheduled = TRUE if reason == "Placed" else FALSE
    found = records_pb2.DeploymentPlanRecord(
        deployment_uid=uid,
        observed_generation=4,
        conditions=[
            deployment_pb2.Condition(type="Scheduled", status=scheduled, reason=reason),
            deployment_pb2.Condition(type="Available", status=TRUE if available else FALSE),
        ],
    )
    if failures:
        found.last_failure.consecutive_failures = failures
    if waiting:
        found.last_failure.next_attempt_time.seconds = 99
    return found


def replicas(
    *states: types_pb2.ReplicaState.ValueType, generation: int = 2
) -> tuple[list[replica_pb2.ReplicaAssignment], list[replica_pb2.ReplicaObservation]]:
    orders = [
        replica_pb2.ReplicaAssignment(
            deployment_uid="uid", replica=f"r{index}", generation=generation, desired_state=READY
        )
        for index in range(len(states))
    ]
    seen = [
        replica_pb2.ReplicaObservation(replica=f"r{index}", state=state, healthy=True)
        for index, state in enumerate(states)
    ]
    return orders, seen


@pytest.mark.parametrize(
    ("wanted", "conclusion", "states", "phase", "reconciling"),
    [
        (2, None, (), "PENDING", True),
        (2, concluded(uid="other"), (), "PENDING", True),
        (0, concluded(available=False), (), "STOPPED", False),
        (0, concluded(), (READY,), "STOPPED", True),
        (2, concluded(available=False), (STARTING, STARTING), "STARTING", True),
        (2, concluded(), (READY, READY), "READY", False),
        (2, concluded(available=False), (READY, READY), "STARTING", True),
        (2, concluded(), (READY, STARTING), "DEGRADED", True),
        (2, concluded("Unschedulable", available=False), (), "UNSCHEDULABLE", True),
        (2, concluded("Unschedulable", available=False), (STARTING,), "STARTING", True),
        (2, concluded("Unschedulable"), (READY,), "DEGRADED", True),
        (2, concluded("BackOff", available=False, failures=1, waiting=True), (), "FAILED", True),
        (2, concluded(available=False, failures=1), (STARTING,), "STARTING", True),
        (2, concluded(available=False, failures=2), (STARTING,), "FAILED", True),
        (2, concluded(failures=3), (READY, READY), "READY", False),
    ],
)
def test_the_phase(
    wanted: int,
    conclusion: records_pb2.DeploymentPlanRecord | None,
    states: tuple[types_pb2.ReplicaState.ValueType, ...],
    phase: str,
    *,
    reconciling: bool,
) -> None:
    status = deployment_status(record(wanted), conclusion, *replicas(*states))
    assert types_pb2.DeploymentPhase.Name(status.phase) == f"DEPLOYMENT_PHASE_{phase}"
    assert status.reconciling is reconciling
    assert status.desired_replicas == wanted


def test_unhealthy_foreign_and_outdated_replicas() -> None:
    orders, seen = replicas(READY, READY)
    seen[0].healthy = False
    orders.append(replica_pb2.ReplicaAssignment(deployment_uid="other", replica="x"))
    status = deployment_status(record(), concluded(), orders, seen)
    assert status.ready_replicas == 1
    assert [each.replica for each in status.replicas] == ["r0", "r1"]
    old = deployment_status(record(), concluded(), *replicas(READY, READY, generation=1))
    assert old.phase == types_pb2.DEPLOYMENT_PHASE_READY
    assert old.reconciling


def test_a_replica_in_summary() -> None:
    orders, seen = replicas(READY)
    seen[0].start_time.CopyFrom(Timestamp(seconds=100))
    seen[0].ready_time.CopyFrom(Timestamp(seconds=101, nanos=500_000_000))
    seen[0].pid = 42
    orders[0].desired_state = types_pb2.REPLICA_STATE_DRAINING
    (summary,) = deployment_status(record(), concluded(), orders, seen).replicas
    assert (summary.engine_start_ms, summary.pid) == (1500, 42)
    assert summary.state == types_pb2.REPLICA_STATE_DRAINING
    orders, _ = replicas(READY)
    (summary,) = deployment_status(record(), concluded(), orders, []).replicas
    assert summary.state == types_pb2.REPLICA_STATE_ASSIGNED
    assert summary.engine_start_ms == 0


def test_replicas_wanted() -> None:
    spec = deployment_pb2.DeploymentSpec(engine=types_pb2.ENGINE_VLLM)
    assert desired_replicas(spec) == 1
    spec.replicas = 0
    assert desired_replicas(spec) == 0
    external = deployment_pb2.DeploymentSpec(engine=types_pb2.ENGINE_EXTERNAL)
    external.extra_args.CopyFrom(dict_to_struct({"urls": ["http://a/", "http://b", "http://a"]}))
    assert external_urls(external) == ("http://a", "http://b")
    assert desired_replicas(external) == 2
    external.replicas = 0
    assert desired_replicas(external) == 0


def test_json_survives_the_struct() -> None:
    values = {"a": 1, "b": [1.5, "x", None, True], "c": {"d": 2048}}
    found = struct_to_dict(dict_to_struct(values))
    assert found == values
    assert isinstance(found["a"], int)
