"""ExplainDeployment: the scheduler's own reasons, node by node.

In comes a deployment's name, out come the verdicts of the very filters that placement uses, on the
present state. Nothing is decided here, and the event loop does not wait for it.
"""

from collections.abc import Collection

from millrace.core.v1 import deployment_pb2
from millrace.scheduler.v1 import scheduler_service_pb2 as messages
from millrace.state.v1 import records_pb2

from controlplane.api.context import ApiContext
from controlplane.api.view import ClusterView
from controlplane.knowledge.environments import Environments
from controlplane.reconciler.snapshot import build_snapshot
from controlplane.reconciler.view import View
from controlplane.scheduler import explain_deployment
from controlplane.scheduler.explain import NodeVerdict
from core.states import DeviceKind, Engine
from core.store import keys

_ENGINES = {int(each): each for each in Engine}
_KINDS = {int(each): each for each in DeviceKind}


def view_of(known: ClusterView) -> View:
    """The records that the API knows, of one moment, as the scheduler's snapshot is made of them.

    Nobody changes them any more: a later change makes new mappings.
    """
    return View(
        deployments=known.deployments.items,
        node_specs=known.nodes.items,
        conclusions=known.plans.items,
        assignments=known.assignments.items,
        nodes=known.machines.items,
        observations=known.observations.items,
        namespaces=known.namespaces.items,
    )


async def explain(
    context: ApiContext, request: messages.ExplainDeploymentRequest
) -> messages.ExplainDeploymentResponse:
    """Explains a deployment's placement.

    Raises:
        NotFound: There is no such deployment.
        ResourceExhausted: Too many explanations are being worked out.
    """
    record = context.view.record(request.namespace, request.name)
    records = view_of(context.view)
    return await context.thinking.think(lambda: _explained(records, record, context.environments))


def environment_text(
    environments: Environments,
    spec: deployment_pb2.DeploymentSpec,
    machine: records_pb2.NodeObservationRecord | None,
    devices: Collection[str],
) -> str:
    """The end of a sentence: what an engine would be started from on devices of a node; empty if unknown."""
    listed = machine.inventory.devices if machine is not None else ()
    device = next((each for each in listed if each.id in devices), None)
    if device is None or spec.engine not in _ENGINES or device.kind not in _KINDS:
        return ""
    row = environments.find(_ENGINES[spec.engine], _KINDS[device.kind], device.product)
    return f", in {row.words(spec.extra_args.fields)}" if row is not None else ""


def _explained(
    records: View, record: records_pb2.DeploymentRecord, environments: Environments
) -> messages.ExplainDeploymentResponse:
    explanation = explain_deployment(build_snapshot(records), f"{record.namespace}/{record.name}")
    assert explanation is not None, "the snapshot was made of the same records"
    return messages.ExplainDeploymentResponse(
        summary=explanation.summary,
        suggestion=explanation.suggestion,
        sizing=record.sizing,
        nodes=[
            messages.NodeExplanation(
                node=each.node,
                fits=each.fits,
                failed_rule=each.failed_rule,
                message=_message(each, record, records, environments),
                score=each.score,
            )
            for each in explanation.nodes
        ],
    )


def _message(
    verdict: NodeVerdict, record: records_pb2.DeploymentRecord, records: View, environments: Environments
) -> str:
    """Why a node is refused; of one that is not, what the engine would be started from there."""
    machine = records.nodes.get(keys.ACTUAL_NODES + verdict.node)
    return verdict.message + environment_text(environments, record.spec, machine, verdict.devices)
