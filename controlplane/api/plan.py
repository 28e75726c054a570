"""PlanDeployments: what a declaration would take, thought through by the scheduler itself.

In come models as they would be declared; out come the places that their replicas would get, whom they
would pre-empt, and why the rest would wait. The plan is made of the present records with the models among
them, by the very function that the leader plans with. Nothing is written.
"""

from collections.abc import Sequence
from datetime import datetime

from millrace.core.v1 import deployment_pb2, replica_pb2, sizing_pb2
from millrace.scheduler.v1 import scheduler_service_pb2 as messages
from millrace.state.v1 import records_pb2

from controlplane.api import validation
from controlplane.api.context import ApiContext
from controlplane.api.deployments import needs_new_engines
from controlplane.api.explain import environment_text, view_of
from controlplane.api.fitting import size_all
from controlplane.reconciler.snapshot import build_snapshot, convert_deployment
from controlplane.reconciler.view import View
from controlplane.scheduler import (
    Claim,
    Conclusion,
    DeploymentView,
    Plan,
    Reservation,
    Snapshot,
    plan,
)
from core.store import keys

# A namespace that nobody has: what is planned without one meets no quota and no deployment.
_NOBODY = "millrace-plan"


async def plan_deployments(
    context: ApiContext, request: messages.PlanDeploymentsRequest
) -> messages.PlanDeploymentsResponse:
    """Plans a declaration and changes nothing.

    Raises:
        InvalidArgument: With every wrong field.
        FailedPrecondition: No known node, or the quota, could ever hold a model.
        ResourceExhausted: Too many dry runs are being worked out.
    """
    declaration = messages.DeclareDeploymentsRequest(models=request.models, namespace=request.namespace)
    specs = validation.check_declaration(declaration)
    context.view.require_synced()
    namespace = request.namespace or _NOBODY
    for model, spec in zip(request.models, specs, strict=True):
        existing = context.view.deployments.get(keys.spec_deployment(namespace, model.name))
        if existing is not None and not model.HasField("replicas"):
            # As `apply` does: what is not said stays as it is.
            spec.replicas = existing.spec.replicas
    sizings = await size_all(context, specs, namespace)
    names = [model.name for model in request.models]
    records, now = view_of(context.view), context.clock.now()
    imagined = list(zip(names, specs, sizings, strict=True))
    return await context.thinking.think(lambda: _planned(records, imagined, namespace, now, context))


def _planned(
    records: View,
    imagined: Sequence[tuple[str, deployment_pb2.DeploymentSpec, sizing_pb2.Sizing]],
    namespace: str,
    now: datetime,
    context: ApiContext,
) -> messages.PlanDeploymentsResponse:
    """Plans with the imagined deployments among the records; of the context only what never changes."""
    before = build_snapshot(records)
    deployments = dict(before.deployments)
    for name, spec, sizing in imagined:
        key = f"{namespace}/{name}"
        known = records.deployments.get(keys.spec_deployment(namespace, name))
        deployments[key] = _imagined(key, spec, sizing, known, before.deployments.get(key))
    after = Snapshot(deployments, before.nodes, before.replicas, before.quotas)
    made = plan(after, now, _unnamed, context.policy)
    answers: list[messages.PlannedDeployment] = []
    for name, spec, sizing in imagined:
        exists = f"{namespace}/{name}" in before.deployments
        answer = _answer(name, exists, sizing, made, after, namespace, now)
        for replica in answer.replicas:
            machine = records.nodes.get(keys.ACTUAL_NODES + replica.node)
            devices = {each.device_id for each in replica.devices}
            replica.message += environment_text(context.environments, spec, machine, devices)
        answers.append(answer)
    return messages.PlanDeploymentsResponse(deployments=answers)


def _unnamed(deployment: str) -> str:
    """Nobody will ever see the replica."""
    return f"{deployment} (planned)"


def _imagined(
    key: str,
    spec: deployment_pb2.DeploymentSpec,
    sizing: sizing_pb2.Sizing,
    known: records_pb2.DeploymentRecord | None,
    present: DeploymentView | None,
) -> DeploymentView:
    """The deployment as it would be right after the declaration."""
    record = records_pb2.DeploymentRecord(
        spec=spec, sizing=sizing, uid="planned", generation=1, launch_generation=1
    )
    if known is None or present is None:
        return convert_deployment(key, record, None)
    record.uid, record.generation = known.uid, known.generation + 1
    record.launch_generation = known.launch_generation + needs_new_engines(known.spec, spec)
    view = convert_deployment(key, record, None)
    return DeploymentView(
        key=key,
        uid=view.uid,
        generation=view.generation,
        launch_generation=view.launch_generation,
        desired=view.desired,
        need=view.need,
        external_urls=view.external_urls,
        observed_generation=present.observed_generation,
        priority=view.priority,
        pins=view.pins,
        reservations=present.reservations,
        preemption=present.preemption,
    )


def _answer(
    name: str,
    exists: bool,
    sizing: sizing_pb2.Sizing,
    made: Plan,
    after: Snapshot,
    namespace: str,
    now: datetime,
) -> messages.PlannedDeployment:
    key = f"{namespace}/{name}"
    conclusion = next(each for each in made.conclusions if each.deployment == key)
    replicas = [
        messages.PlannedReplica(node=each.node, devices=_devices(each.claims), message=each.why)
        for each in made.place
        if each.deployment == key
    ]
    fresh = [each for each in conclusion.reservations if each not in after.deployments[key].reservations]
    replicas += [_by_pre_emption(each, after, now) for each in fresh]
    return messages.PlannedDeployment(
        name=name,
        exists=exists,
        sizing=sizing,
        replicas=replicas,
        pending_replicas=max(0, conclusion.pending - len(fresh)),
        message=_message(conclusion, len(fresh)),
    )


def _message(conclusion: Conclusion, pre_empting: int) -> str:
    if pre_empting and conclusion.pending == pre_empting:
        return f"all are placed once those that {pre_empting} of them pre-empt have ended"
    return conclusion.scheduled.message


def _by_pre_emption(kept: Reservation, after: Snapshot, now: datetime) -> messages.PlannedReplica:
    victims = [after.replicas[each] for each in kept.victims]
    seconds = max(0.0, (kept.deadline - now).total_seconds())
    return messages.PlannedReplica(
        node=kept.node,
        devices=_devices(kept.claims),
        message="fits nowhere without pre-empting less important replicas, which get "
        f"{seconds:.0f} s to finish",
        preempts=[f"{each.deployment}/{each.replica}" for each in victims],
    )


def _devices(claims: Sequence[Claim]) -> list[replica_pb2.DeviceClaim]:
    return [
        replica_pb2.DeviceClaim(device_id=each.device_id, memory_bytes=each.memory_bytes) for each in claims
    ]
