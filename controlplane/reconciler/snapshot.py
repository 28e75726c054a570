"""From the records of a moment to the scheduler's values. Pure.

Protobuf ends here: the scheduler sees frozen values only. `build_snapshot` converts everything; `follow`
converts what has changed, into books that are kept, and leads to the same.
"""

from collections.abc import Iterable
from datetime import UTC, datetime

from millrace.core.v1 import policy_pb2, replica_pb2, types_pb2
from millrace.state.v1 import records_pb2

from controlplane.convert import desired_replicas, external_urls
from controlplane.reconciler.rollouts import good_launch, launched_record
from controlplane.reconciler.view import View
from controlplane.scheduler import (
    Claim,
    DeploymentView,
    DeviceView,
    EngineView,
    Failure,
    Launch,
    Limits,
    Need,
    NodeView,
    Pin,
    Preemption,
    Progress,
    Quota,
    ReplicaView,
    Reservation,
    Snapshot,
    Taint,
    Toleration,
    effective,
)
from controlplane.scheduler.books import Books
from controlplane.scheduler.structs import PRIORITY_DEFAULT
from controlplane.status import replica_state
from core.clock import from_timestamp
from core.states import DeviceKind, Engine, NodeState, ReplicaState, TaintEffect
from core.store import keys

_EPOCH = datetime.fromtimestamp(0, UTC)
_ENGINES = {int(each): each for each in Engine}
_KINDS = {int(each): each for each in DeviceKind}
_NODE_STATES = {int(each): each for each in NodeState}
_REPLICA_STATES = sorted(ReplicaState)


def build_snapshot(view: View) -> Snapshot:
    """Converts the records; what does not belong to the present deployment of a name is left to rules."""
    deployments: dict[str, DeploymentView] = {}
    for key in view.deployments:
        name = key.removeprefix(keys.SPEC_DEPLOYMENTS)
        found = deployment_view(view, name)
        if found is not None:
            deployments[name] = found
    nodes: dict[str, NodeView] = {}
    for key in view.nodes:
        name = key.removeprefix(keys.ACTUAL_NODES)
        node = _node_view(view, name)
        if node is not None:
            nodes[name] = node
    replicas: dict[str, ReplicaView] = {}
    for key in view.assignments:
        replica = _replica_view(view, key.removeprefix(keys.PLAN_REPLICAS))
        if replica is not None:
            replicas[replica.replica] = replica
    quotas: dict[str, Quota] = {}
    for key in view.namespaces:
        namespace = key.removeprefix(keys.SPEC_NAMESPACES)
        quota = _quota_view(view, namespace)
        if quota is not None:
            quotas[namespace] = quota
    return Snapshot(deployments=deployments, nodes=nodes, replicas=replicas, quotas=quotas)


def follow(books: Books, view: View, changed: Iterable[str]) -> set[str]:
    """Brings books up to date.

    Args:
        books: The scheduler's.
        view: The records of this moment.
        changed: Keys that have changed since the books were last brought up to date.

    Returns:
        Deployments of which a record has changed, as `namespace/name`.
    """
    touched: set[str] = set()
    for key in changed:
        if name := _below(key, keys.SPEC_DEPLOYMENTS, keys.PLAN_DEPLOYMENTS):
            books.set_deployment(name, deployment_view(view, name))
            touched.add(name)
        elif path := _below(key, keys.PLAN_REPLICAS, keys.ACTUAL_REPLICAS):
            owner, _, replica = path.rpartition("/")
            books.set_replica(replica, _replica_view(view, path))
            touched.add(owner)
        elif name := _below(key, keys.SERVE_DEPLOYMENTS):
            touched.add(name)
        elif path := _below(key, keys.SERVE_ENDPOINTS):
            touched.add(path.rpartition("/")[0])
        elif node := _below(key, keys.SPEC_NODES, keys.ACTUAL_NODES):
            books.set_node(node, _node_view(view, node))
        elif namespace := _below(key, keys.SPEC_NAMESPACES):
            books.set_quota(namespace, _quota_view(view, namespace))
    return touched


def _below(key: str, *prefixes: str) -> str:
    """What follows one of the prefixes; empty where the key is under none."""
    return next((key.removeprefix(prefix) for prefix in prefixes if key.startswith(prefix)), "")


def deployment_view(view: View, name: str) -> DeploymentView | None:
    """A deployment as the scheduler sees it; None where there is none."""
    record = view.deployments.get(keys.SPEC_DEPLOYMENTS + name)
    if record is None:
        return None
    concluded = view.conclusions.get(keys.PLAN_DEPLOYMENTS + name)
    if concluded is not None and concluded.deployment_uid != record.uid:
        concluded = None
    return convert_deployment(name, record, concluded)


def _node_view(view: View, name: str) -> NodeView | None:
    record = view.nodes.get(keys.ACTUAL_NODES + name)
    return None if record is None else _node(name, record, view.node_specs.get(keys.SPEC_NODES + name))


def _replica_view(view: View, path: str) -> ReplicaView | None:
    assignment = view.assignments.get(keys.PLAN_REPLICAS + path)
    observed = view.observations.get(keys.ACTUAL_REPLICAS + path)
    return None if assignment is None else _replica(assignment, observed)


def _quota_view(view: View, namespace: str) -> Quota | None:
    record = view.namespaces.get(keys.SPEC_NAMESPACES + namespace)
    if record is None or not record.spec.HasField("quota"):
        return None
    quota = record.spec.quota
    return Quota(
        devices=quota.devices if quota.HasField("devices") else None,
        replicas=quota.replicas if quota.HasField("replicas") else None,
    )


def convert_deployment(
    name: str, record: records_pb2.DeploymentRecord, concluded: records_pb2.DeploymentPlanRecord | None
) -> DeploymentView:
    """Converts a deployment's records.

    After a roll back it is the deployment with the launch that served before.

    Args:
        name: `namespace/name`.
        record: What the user wants.
        concluded: What was concluded about this very deployment before.
    """
    declared = DeploymentView(
        key=name,
        uid=record.uid,
        generation=record.generation,
        launch_generation=record.launch_generation,
        desired=desired_replicas(record.spec, concluded),
        need=_need(record),
        external_urls=external_urls(record.spec),
        failure=_failure(concluded),
        observed_generation=concluded.observed_generation if concluded is not None else 0,
        spec_launch_generation=record.launch_generation,
        limits=_limits(record.spec.rollout),
        progress=_progress(concluded),
        good=_good(record, concluded),
        priority=record.spec.priority if record.spec.HasField("priority") else PRIORITY_DEFAULT,
        pins=tuple(Pin(each.node, tuple(each.device_ids)) for each in record.spec.placement.device_pins),
        reservations=tuple(_reservation(each) for each in concluded.reservations) if concluded else (),
        preemption=_preemption(concluded),
    )
    return effective(declared)


def _need(record: records_pb2.DeploymentRecord) -> Need:
    spec, sizing = record.spec, record.sizing
    return Need(
        engine=_ENGINES.get(spec.engine, Engine.UNSPECIFIED),
        device_kinds=_kinds(sizing.device_kinds),
        device_count=sizing.device_count,
        memory_bytes=sizing.total_bytes,
        model=sizing.launch_model or spec.model,
        node_selector=tuple(sorted(spec.placement.node_selector.items())),
        tolerations=tuple(Toleration(each.key, each.value) for each in spec.placement.tolerations),
    )


def _reservation(kept: records_pb2.RoomReservation) -> Reservation:
    return Reservation(
        node=kept.node,
        claims=tuple(Claim(each.device_id, each.memory_bytes) for each in kept.devices),
        victims=tuple(kept.victims),
        deadline=from_timestamp(kept.deadline_time) or _EPOCH,
    )


def _preemption(concluded: records_pb2.DeploymentPlanRecord | None) -> Preemption | None:
    if concluded is None or not concluded.HasField("preemption"):
        return None
    lost = concluded.preemption
    return Preemption(
        by=lost.deployment,
        by_priority=lost.priority,
        replica=lost.replica,
        node=lost.node,
        time=from_timestamp(lost.time) or _EPOCH,
    )


def _limits(rollout: policy_pb2.Rollout) -> Limits:
    return Limits(
        surge=rollout.max_surge if rollout.HasField("max_surge") else None,
        unavailable=rollout.max_unavailable if rollout.HasField("max_unavailable") else None,
        progress_deadline=(
            rollout.progress_deadline.ToTimedelta() if rollout.HasField("progress_deadline") else None
        ),
        drain=rollout.drain_timeout.ToTimedelta() if rollout.HasField("drain_timeout") else None,
    )


def _progress(concluded: records_pb2.DeploymentPlanRecord | None) -> Progress | None:
    if concluded is None or not concluded.HasField("rollout"):
        return None
    rollout = concluded.rollout
    return Progress(
        generation=rollout.launch_generation,
        progress_time=from_timestamp(rollout.progress_time) or _EPOCH,
        served=rollout.served_replicas,
        furthest=_state(rollout.furthest_state),
        complete_time=from_timestamp(rollout.complete_time),
        rolled_back_reason=rollout.rolled_back_reason,
    )


def _good(
    record: records_pb2.DeploymentRecord, concluded: records_pb2.DeploymentPlanRecord | None
) -> Launch | None:
    good = good_launch(record, concluded)
    if good is None:
        return None
    generation = good.launch_generation
    return Launch(generation, _need(launched_record(record, generation, concluded)))


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
        generation=failure.generation,
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
        # What operators say of a machine counts more than what it says of itself.
        labels=frozenset({**record.inventory.labels, **(wanted.spec.labels if wanted else {})}.items()),
        taints=tuple(_taint(each) for each in wanted.spec.taints) if wanted is not None else (),
        cached_models=frozenset(record.inventory.cached_models),
        heat=_heat(record),
    )


def _taint(taint: policy_pb2.Taint) -> Taint:
    drives_out = taint.effect == types_pb2.TAINT_EFFECT_NO_EXECUTE
    effect = TaintEffect.NO_EXECUTE if drives_out else TaintEffect.NO_SCHEDULE
    return Taint(taint.key, taint.value, effect)


def _heat(record: records_pb2.NodeObservationRecord) -> float | None:
    """Mean utilisation of the devices whose utilisation is known; None where none is."""
    known = [each.utilization_ratio for each in record.devices if each.HasField("utilization_ratio")]
    return sum(known) / len(known) if known else None


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
        preempted_by=assignment.preempted_by,
    )


def _state(value: int) -> ReplicaState:
    """The known state at or below a value: an agent of a later version may report one between."""
    return max((state for state in _REPLICA_STATES if state <= value), default=ReplicaState.PENDING)


def _kinds(values: Iterable[int]) -> tuple[DeviceKind, ...]:
    return tuple(_KINDS[value] for value in values if value in _KINDS)
