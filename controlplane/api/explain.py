"""ExplainDeployment: the scheduler's own reasons, node by node.

In comes a deployment's name, out come the verdicts of the very filters that placement uses, on the
present state. Nothing is decided here, and the event loop does not wait for it.
"""

from millrace.scheduler.v1 import scheduler_service_pb2 as messages
from millrace.state.v1 import records_pb2

from controlplane.api.context import ApiContext
from controlplane.api.view import ClusterView
from controlplane.reconciler.snapshot import build_snapshot
from controlplane.reconciler.view import View
from controlplane.scheduler import explain_deployment


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
    return await context.thinking.think(lambda: _explained(records, record))


def _explained(records: View, record: records_pb2.DeploymentRecord) -> messages.ExplainDeploymentResponse:
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
                message=each.message,
                score=each.score,
            )
            for each in explanation.nodes
        ],
    )
