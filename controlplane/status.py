"""What became of a deployment, derived from the records of those who know.

In come the spec's record, what the scheduler concluded, the assignments and what agents report of them;
out goes `DeploymentStatus`. Status is not stored anywhere: it is worked out from these whenever somebody
asks, so that it cannot disagree with them. Pure: no store, no clock.
"""

from collections.abc import Iterable, Mapping

from millrace.core.v1 import deployment_pb2, replica_pb2, types_pb2
from millrace.state.v1 import records_pb2

from controlplane.convert import autoscaled, desired_replicas
from controlplane.scheduler.conclude import UNPLACED
from core.clock import from_timestamp

SCHEDULED = "Scheduled"
AVAILABLE = "Available"
PROGRESSING = "Progressing"


def replica_state(
    assignment: replica_pb2.ReplicaAssignment, observation: replica_pb2.ReplicaObservation | None
) -> types_pb2.ReplicaState.ValueType:
    """How far a replica has come: the larger of what was ordered and what was seen wins."""
    ordered = types_pb2.REPLICA_STATE_ASSIGNED
    if assignment.desired_state == types_pb2.REPLICA_STATE_DRAINING:
        ordered = types_pb2.REPLICA_STATE_DRAINING
    return max(ordered, observation.state) if observation is not None else ordered


def deployment_status(
    record: records_pb2.DeploymentRecord,
    plan_record: records_pb2.DeploymentPlanRecord | None,
    assignments: Iterable[replica_pb2.ReplicaAssignment],
    observations: Iterable[replica_pb2.ReplicaObservation],
) -> deployment_pb2.DeploymentStatus:
    """Derives a deployment's status.

    Args:
        record: What the user wants.
        plan_record: What the scheduler concluded; None before it has looked. A record of an earlier
            deployment of the same name (another uid) is ignored.
        assignments: Those of the deployment; assignments of another uid are ignored.
        observations: Those of the deployment; replicas without an assignment are ignored.
    """
    if plan_record is not None and plan_record.deployment_uid != record.uid:
        plan_record = None
    seen = {each.replica: each for each in observations}
    own = sorted(
        (each for each in assignments if each.deployment_uid == record.uid),
        key=lambda each: (each.create_time.ToNanoseconds(), each.replica),
    )
    desired = desired_replicas(record.spec, plan_record)
    launched = launch_generation(record, plan_record)
    # The Available condition is written together with the endpoints: before that, no router knows of a
    # replica that its agent calls ready already.
    ready = (
        sum(1 for each in own if _serves(each, seen.get(each.replica)))
        if _holds(plan_record, AVAILABLE)
        else 0
    )
    observed_generation = plan_record.observed_generation if plan_record is not None else 0
    status = deployment_pb2.DeploymentStatus(
        observed_generation=observed_generation,
        reconciling=(
            observed_generation != record.generation
            or ready != desired
            or len(own) != desired
            or not _holds(plan_record, SCHEDULED)
            or any(each.generation != launched for each in own)
        ),
        phase=_phase(
            desired=desired,
            ready=ready,
            unhealthy=sum(1 for each in own if _unhealthy(each, seen.get(each.replica))),
            live=_live(own, seen),
            plan_record=plan_record,
        ),
        ready_replicas=ready,
        desired_replicas=desired,
        replicas=[_summary(each, seen.get(each.replica)) for each in own],
    )
    if record.HasField("sizing"):
        status.sizing.CopyFrom(record.sizing)
    if plan_record is not None:
        status.conditions.extend(plan_record.conditions)
        if plan_record.HasField("last_failure"):
            status.last_failure.CopyFrom(plan_record.last_failure)
        if plan_record.HasField("rollout"):
            status.rollout.CopyFrom(_rollout(record, plan_record, own, seen))
        if autoscaled(record.spec) and plan_record.HasField("autoscale"):
            status.autoscale.CopyFrom(_autoscale(plan_record.autoscale))
    return status


def launch_generation(
    record: records_pb2.DeploymentRecord, plan_record: records_pb2.DeploymentPlanRecord | None
) -> int:
    """Launch generation that new replicas are started from: not the spec's after a roll back."""
    if plan_record is None or not plan_record.HasField("good_launch"):
        return record.launch_generation
    rollout = plan_record.rollout
    if rollout.rolled_back_reason and rollout.launch_generation == record.launch_generation:
        return plan_record.good_launch.launch_generation
    return record.launch_generation


def _rollout(
    record: records_pb2.DeploymentRecord,
    plan_record: records_pb2.DeploymentPlanRecord,
    own: list[replica_pb2.ReplicaAssignment],
    seen: Mapping[str, replica_pb2.ReplicaObservation],
) -> deployment_pb2.RolloutStatus:
    rollout, good = plan_record.rollout, plan_record.good_launch
    updated = [each for each in own if each.generation == record.launch_generation]
    present = rollout.launch_generation == record.launch_generation
    status = deployment_pb2.RolloutStatus(
        launch_generation=record.launch_generation,
        serving_generation=launch_generation(record, plan_record),
        updated_replicas=sum(1 for each in updated if _serves(each, seen.get(each.replica))),
        outdated_replicas=len(own) - len(updated),
        rolled_back_reason=rollout.rolled_back_reason if present else "",
    )
    if not (present and rollout.HasField("complete_time")):
        status.progress_time.CopyFrom(rollout.progress_time)
    if plan_record.HasField("good_launch"):
        if good.launch_generation != record.launch_generation:
            status.previous_spec.CopyFrom(good.spec)
        elif good.HasField("previous_spec"):
            status.previous_spec.CopyFrom(good.previous_spec)
    return status


def _autoscale(state: records_pb2.AutoscaleState) -> deployment_pb2.AutoscaleStatus:
    status = deployment_pb2.AutoscaleStatus(
        desired_replicas=state.desired_replicas,
        floor_replicas=state.floor_replicas,
        reason=state.reason,
        message=state.message,
    )
    if state.HasField("out_time"):
        status.out_time.CopyFrom(state.out_time)
    if state.HasField("step_time"):
        status.step_time.CopyFrom(state.step_time)
    return status


def _holds(plan_record: records_pb2.DeploymentPlanRecord | None, kind: str) -> bool:
    return plan_record is not None and any(
        each.type == kind and each.status == types_pb2.CONDITION_STATUS_TRUE
        for each in plan_record.conditions
    )


def _serves(
    assignment: replica_pb2.ReplicaAssignment, observation: replica_pb2.ReplicaObservation | None
) -> bool:
    return (
        observation is not None
        and observation.healthy
        and replica_state(assignment, observation) == types_pb2.REPLICA_STATE_READY
    )


def _unhealthy(
    assignment: replica_pb2.ReplicaAssignment, observation: replica_pb2.ReplicaObservation | None
) -> bool:
    """Tells whether a replica has served, still runs, and fails its health checks."""
    return (
        observation is not None
        and not observation.healthy
        and replica_state(assignment, observation) == types_pb2.REPLICA_STATE_READY
    )


def _live(
    own: list[replica_pb2.ReplicaAssignment], seen: Mapping[str, replica_pb2.ReplicaObservation]
) -> int:
    """Replicas that serve or may come to serve."""
    return sum(
        1 for each in own if replica_state(each, seen.get(each.replica)) <= types_pb2.REPLICA_STATE_READY
    )


def _phase(
    *,
    desired: int,
    ready: int,
    unhealthy: int,
    live: int,
    plan_record: records_pb2.DeploymentPlanRecord | None,
) -> types_pb2.DeploymentPhase.ValueType:
    """The one-word summary; the first row that holds wins."""
    failing = False
    unschedulable = False
    if plan_record is not None:
        failure = plan_record.last_failure
        # A first failure whose replacement is under way is not yet a failing deployment: a replica that
        # had served and crashed is replaced at once.
        failing = plan_record.HasField("last_failure") and (
            failure.HasField("next_attempt_time") or failure.consecutive_failures > 1
        )
        unschedulable = any(
            each.type == SCHEDULED
            and each.status == types_pb2.CONDITION_STATUS_FALSE
            and each.reason in UNPLACED
            for each in plan_record.conditions
        )
    rows = (
        (desired == 0, types_pb2.DEPLOYMENT_PHASE_STOPPED),
        (ready >= desired, types_pb2.DEPLOYMENT_PHASE_READY),
        (ready > 0 or unhealthy > 0, types_pb2.DEPLOYMENT_PHASE_DEGRADED),
        (unschedulable and live == 0, types_pb2.DEPLOYMENT_PHASE_UNSCHEDULABLE),
        (failing, types_pb2.DEPLOYMENT_PHASE_FAILED),
        (live > 0, types_pb2.DEPLOYMENT_PHASE_STARTING),
    )
    return next((phase for holds, phase in rows if holds), types_pb2.DEPLOYMENT_PHASE_PENDING)


def _summary(
    assignment: replica_pb2.ReplicaAssignment, observation: replica_pb2.ReplicaObservation | None
) -> deployment_pb2.ReplicaSummary:
    summary = deployment_pb2.ReplicaSummary(
        replica=assignment.replica,
        node=assignment.node,
        state=replica_state(assignment, observation),
        generation=assignment.generation,
        device_ids=[claim.device_id for claim in assignment.devices],
    )
    if assignment.HasField("create_time"):
        summary.assign_time.CopyFrom(assignment.create_time)
    if observation is None:
        summary.message = f"waits for the agent of node {assignment.node} to take it up"
        return summary
    summary.message = observation.message
    summary.url = observation.url
    summary.pid = observation.pid
    summary.healthy = observation.healthy
    if observation.HasField("facts"):
        summary.facts.CopyFrom(observation.facts)
    if observation.HasField("ready_time"):
        summary.ready_time.CopyFrom(observation.ready_time)
    started, ready = from_timestamp(observation.start_time), from_timestamp(observation.ready_time)
    if started is not None and ready is not None and ready >= started:
        summary.engine_start_ms = round((ready - started).total_seconds() * 1000)
    return summary
