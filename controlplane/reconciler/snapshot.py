"""From the records of a moment to the scheduler's snapshot. Pure.

Protobuf ends here: the scheduler sees frozen values only.
"""

from collections.abc import Iterable
from datetime import UTC, datetime

from millrace.core.v1 import replica_pb2, types_pb2
from millrace.state.v1 import records_pb2

from controlplane.convert import desired_replicas, external_urls
from controlplane.reconciler.view import View
from controlplane.scheduler import (
    Claim,
    DeploymentView,
    DeviceView,
    EngineView,
    Failure,
    Need,
    NodeView,
    ReplicaView,
    Snapshot,
)
from controlplane.status import replica_state
from core.clock import from_timestamp
from core.states import DeviceKind, Engine, NodeState, ReplicaState
from core.store import keys

_EPOCH = datetime.fromtimestamp(0, UTC)
_ENGINES = {int(each): each for each in Engine}
_KINDS = {int(each): each for each in DeviceKind}
_NODE_STATES = {int(each): each for each in NodeState}
_REPLICA_STATES = sorted(ReplicaState)


def build_snapshot(view: View) -> Snapshot:
    """Converts the records; what does not belong to the present deployment of a name is left to rules."""
    deployments: dict[str, DeploymentView] = {}
    for key, record in view.deployments.items():
        name = key.removeprefix(keys.SPEC_DEPLOYMENTS)
        concluded = view.conclusions.get(keys.PLAN_DEPLOYMENTS + name)
        if concluded is not None and concluded.deployment_uid != record.uid:
            concluded = None
        deployments[name] = _deployment(name, record, concluded)
    nodes: dict[str, NodeView] = {}
    for key, node_record in view.nodes.items():
        name = key.removeprefix(keys.ACTUAL_NODES)
        nodes[name] = _node(name, node_record, view.node_specs.get(keys.SPEC_NODES + name))
    replicas: dict[str, ReplicaView] = {}
    for key, assignment in view.assignments.items():
        observed = view.observations.get(keys.ACTUAL_REPLICAS + key.removeprefix(keys.PLAN_REPLICAS))
        replicas[assignment.replica] = _replica(assignment, observed)
    return Snapshot(deployments=deployments, nodes=nodes, replicas=replicas)


def _deployment(
    name: str, record: records_pb2.DeploymentRecord, concluded: records_pb2.DeploymentPlanRecord | None
) -> DeploymentView:
    sizing = record.sizing
    return DeploymentView(
        key=name,
        uid=record.uid,
        generation=record.generation,
        launch_generation=record.launch_generation,
        desired=desired_replicas(record.spec),
        need=Need(
            engine=_ENGINES.get(record.spec.engine, Engine.UNSPECIFIED),
            device_kinds=_kinds(sizing.device_kinds),
            device_count=sizing.device_count,
            memory_bytes=sizing.total_bytes,
        ),
        external_urls=external_urls(record.spec),
        failure=_failure(concluded),
        observed_generation=concluded.observed_generation if concluded is not None else 0,
    )


def _failure(concluded: records_pb2.DeploymentPlanRecord | None) -> Failure | None:
    if concluded is None or not concluded.HasField("last_failure"):
        return None
    failure = concluded.last_failure
    return Failure(
        replica=failure.replica,
        node=failure.node,
        message=failure.message,
        time=from_timestamp(failure.time) or _EPOCH,
        consecutive=failure.consecutive_failures,
        next_attempt=from_timestamp(failure.next_attempt_time),
    )


def _node(
    name: str, record: records_pb2.NodeObservationRecord, wanted: records_pb2.NodeRecord | None
) -> NodeView:
    return NodeView(
        name=name,
        state=_NODE_STATES.get(record.state, NodeState.UNSPECIFIED),
        cordoned=wanted is not None and wanted.spec.cordoned,
        draining=wanted is not None and wanted.spec.draining,
        devices=tuple(
            DeviceView(device.id, _KINDS[device.kind], device.memory_bytes)
            for device in record.inventory.devices
            if device.kind in _KINDS
        ),
        engines=tuple(
            EngineView(_ENGINES[each.engine], frozenset(_kinds(each.device_kinds)), each.unavailable_reason)
            for each in record.inventory.engines
            if each.engine in _ENGINES
        ),
    )


def _replica(
    assignment: replica_pb2.ReplicaAssignment, observed: replica_pb2.ReplicaObservation | None
) -> ReplicaView:
    draining = assignment.desired_state == types_pb2.REPLICA_STATE_DRAINING
    return ReplicaView(
        replica=assignment.replica,
        deployment=f"{assignment.namespace}/{assignment.deployment}",
        uid=assignment.deployment_uid,
        generation=assignment.generation,
        node=assignment.node,
        claims=tuple(Claim(each.device_id, each.memory_bytes) for each in assignment.devices),
        draining=draining,
        state=_state(replica_state(assignment, observed)),
        created=from_timestamp(assignment.create_time) or _EPOCH,
        external_url=assignment.launch.external_url,
        healthy=observed is None or observed.healthy,
        observed=observed is not None,
        state_time=from_timestamp(observed.state_time) if observed is not None else None,
        ready_time=from_timestamp(observed.ready_time) if observed is not None else None,
        drain_deadline=from_timestamp(assignment.drain_deadline_time) if draining else None,
        message=observed.message if observed is not None else "",
    )


def _state(value: int) -> ReplicaState:
    """The known state at or below a value: an agent of a later version may report one between."""
    return max((state for state in _REPLICA_STATES if state <= value), default=ReplicaState.PENDING)


def _kinds(values: Iterable[int]) -> tuple[DeviceKind, ...]:
    return tuple(_KINDS[value] for value in values if value in _KINDS)
