"""ExplainDeployment: the scheduler's own reasons, node by node.

In comes a deployment's name, out come the verdicts of the very filters that placement uses, on the
present state. Nothing is decided here.
"""

from millrace.scheduler.v1 import scheduler_service_pb2 as messages

from controlplane.api.context import ApiContext
from controlplane.api.view import ClusterView
from controlplane.reconciler.snapshot import build_snapshot
from controlplane.reconciler.view import View
from controlplane.scheduler import explain_deployment


def view_of(known: ClusterView) -> View:
    """The records that the API knows, as the scheduler's snapshot is made of them."""
    return View(
        deployments=known.deployments.items,
        node_specs=known.nodes.items,
        conclusions=known.plans.items,
        assignments=known.assignments.items,
        nodes=known.machines.items,
        observations=known.observations.items,
        namespaces=known.namespaces.items,
    )


def explain(
    context: ApiContext, request: messages.ExplainDeploymentRequest
) -> messages.ExplainDeploymentResponse:
    """Explains a deployment's placement.

    Raises:
        NotFound: There is no such deployment.
    """
    known = context.view
    record = known.record(request.namespace, request.name)
    snapshot = build_snapshot(view_of(known))
    explanation = explain_deployment(snapshot, f"{request.namespace}/{request.name}")
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
