"""Roll-outs and autoscaling in the plan's record. Pure.

In come what the scheduler concluded and the record before, out go the fields of the record after: how far the
launch generation has come, the launch that a failed update goes back to, and the autoscaler's state, which is
carried over as it is. Which launch a replica is started from is read here too. The spec is never written.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from millrace.core.v1 import deployment_pb2, types_pb2
from millrace.state.v1 import records_pb2

from controlplane.convert import autoscaled
from controlplane.scheduler import Conclusion
from core.clock import to_timestamp

# Of the spec, what engines are started from; the rest is as the user wants it now.
_LAUNCH_FIELDS = ("model", "engine", "quantization", "max_model_len", "extra_args")


@dataclass(frozen=True, slots=True)
class Told:
    """What a change of the roll-out calls for.

    Attributes:
        reason: Of an event; empty for none.
        message: Of the event.
        warning: Whether someone should look.
        addition: The engine's last words, to be put behind the condition's message; empty for none.
    """

    reason: str = ""
    message: str = ""
    warning: bool = False
    addition: str = ""


def record_rollout(
    after: records_pb2.DeploymentPlanRecord,
    before: records_pb2.DeploymentPlanRecord | None,
    spec: records_pb2.DeploymentRecord,
    conclusion: Conclusion,
    log_tail: Iterable[str],
) -> Told:
    """Writes down how far a launch generation has come.

    Args:
        after: Record to fill.
        before: The one that stands; None without one of the same deployment.
        spec: What the user wants.
        conclusion: What the scheduler concluded.
        log_tail: Last lines of the engine that failed last.
    """
    progress = conclusion.progress
    kept = good_launch(spec, before)
    if kept is not None:
        after.good_launch.CopyFrom(kept)
    if progress is None:
        return Told()
    _keep_good(after, spec, conclusion)
    earlier = before.rollout if before is not None else records_pb2.RolloutState()
    same = earlier.launch_generation == progress.generation
    addition, reason = "", progress.rolled_back_reason
    if reason and not (same and earlier.rolled_back_reason):
        last = next((line.strip() for line in reversed(list(log_tail)) if line.strip()), "")
        addition = f" (last log line: {last})" if last else ""
        reason += addition
    after.rollout.launch_generation = progress.generation
    after.rollout.progress_time.CopyFrom(to_timestamp(progress.progress_time))
    after.rollout.served_replicas = progress.served
    after.rollout.furthest_state = types_pb2.ReplicaState.ValueType(int(progress.furthest))
    after.rollout.rolled_back_reason = reason
    if progress.complete_time is not None:
        after.rollout.complete_time.CopyFrom(to_timestamp(progress.complete_time))
    generation = progress.generation
    if addition or (reason and not (same and earlier.rolled_back_reason)):
        message = f"launch generation {generation} is rolled back: {reason}; the spec stays as it is"
        return Told("RolledBack", message, warning=True, addition=addition)
    done = progress.complete_time is not None and not (same and earlier.HasField("complete_time"))
    if done and not reason and generation > 1 and conclusion.progressing is not None:
        return Told("RolloutComplete", conclusion.progressing.message)
    return Told()


def good_launch(
    spec: records_pb2.DeploymentRecord, concluded: records_pb2.DeploymentPlanRecord | None
) -> records_pb2.LaunchRecord | None:
    """Returns the launch that a failed update goes back to; None where none has served.

    A launch that serves in full when the spec changes is the best that is known, even if it has not served
    for long: going back further would replace replicas that nothing is wrong with.
    """
    if concluded is None:
        return None
    served = concluded.served_launch
    superseded = concluded.HasField("served_launch") and served.launch_generation != spec.launch_generation
    crashing = (
        concluded.HasField("last_failure") and concluded.last_failure.generation == served.launch_generation
    )
    if superseded and not crashing:
        return served
    return concluded.good_launch if concluded.HasField("good_launch") else None


def _keep_good(
    after: records_pb2.DeploymentPlanRecord, spec: records_pb2.DeploymentRecord, conclusion: Conclusion
) -> None:
    """Takes the spec's launch as the one to go back to once it has proved itself, and notes it before."""
    generation, progress = spec.launch_generation, conclusion.progress
    if after.good_launch.launch_generation == generation:
        return
    previous = after.good_launch.spec if after.HasField("good_launch") else None
    launch = records_pb2.LaunchRecord(
        launch_generation=generation,
        spec=launch_part(spec.spec),
        sizing=spec.sizing,
        previous_spec=previous,
    )
    if conclusion.good_generation == generation:
        after.good_launch.CopyFrom(launch)
    elif progress is not None and progress.complete_time is not None and not progress.rolled_back_reason:
        after.served_launch.CopyFrom(launch)


def launch_part(spec: deployment_pb2.DeploymentSpec) -> deployment_pb2.DeploymentSpec:
    """Of a spec, what engines are started from."""
    part = deployment_pb2.DeploymentSpec()
    part.CopyFrom(spec)
    for descriptor, _ in spec.ListFields():
        if descriptor.name not in _LAUNCH_FIELDS:
            part.ClearField(descriptor.name)  # type: ignore[arg-type]  # a name of the descriptor
    return part


def launched_record(
    record: records_pb2.DeploymentRecord,
    generation: int,
    concluded: records_pb2.DeploymentPlanRecord | None,
) -> records_pb2.DeploymentRecord:
    """Returns the record with the launch of a generation in place of its own.

    Raises:
        ValueError: No launch of that generation is kept.
    """
    if generation == record.launch_generation:
        return record
    good = good_launch(record, concluded)
    if good is None or good.launch_generation != generation:
        raise ValueError(f"launch generation {generation} of {record.namespace}/{record.name} is not kept")
    launched = records_pb2.DeploymentRecord()
    launched.CopyFrom(record)
    for name in _LAUNCH_FIELDS:
        launched.spec.ClearField(name)  # type: ignore[arg-type]  # a name of the message
    launched.spec.MergeFrom(good.spec)
    launched.sizing.CopyFrom(good.sizing)
    launched.launch_generation = generation
    return launched


def keep_autoscale(
    after: records_pb2.DeploymentPlanRecord,
    before: records_pb2.DeploymentPlanRecord | None,
    spec: records_pb2.DeploymentRecord,
) -> None:
    """Carries the autoscaler's state over; a spec without a policy ends it."""
    if before is not None and before.HasField("autoscale") and autoscaled(spec.spec):
        after.autoscale.CopyFrom(before.autoscale)
