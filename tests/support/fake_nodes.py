"""The part of the fake scheduler that speaks of nodes and of dry runs."""

from typing import Any

from google.protobuf.message import Message
from millrace.core.v1.node_pb2 import Node
from millrace.scheduler.v1 import scheduler_service_pb2 as messages

from core import errors


class FakeNodes:
    """Nodes that a test fills in, labels and taints as they were sent; a dry run finds no room."""

    nodes: dict[str, Node]

    async def _begin(self, method: str, request: Message) -> None:
        raise NotImplementedError

    def _node(self, name: str) -> Node:
        if name not in self.nodes:
            raise errors.NotFound(f"node {name} does not exist", metadata={"node": name})
        return self.nodes[name]

    async def UpdateNode(  # noqa: N802 - the contract's spelling
        self, request: messages.UpdateNodeRequest, context: Any
    ) -> messages.UpdateNodeResponse:
        await self._begin("UpdateNode", request)
        node = self._node(request.name)
        for path in request.update_mask.paths:
            node.spec.ClearField(path)  # type: ignore[arg-type]  # the fields that a client may name
        node.spec.MergeFrom(request.spec)
        return messages.UpdateNodeResponse(node=node)

    async def PlanDeployments(  # noqa: N802 - the contract's spelling
        self, request: messages.PlanDeploymentsRequest, context: Any
    ) -> messages.PlanDeploymentsResponse:
        await self._begin("PlanDeployments", request)
        return messages.PlanDeploymentsResponse(
            deployments=[
                messages.PlannedDeployment(name=each.name, pending_replicas=each.replicas or 1)
                for each in request.models
            ]
        )
