"""SchedulerService as gRPC sees it: every method delegates, nothing is decided here.

In come checked credentials (`core.rpc` has seen to that) and requests, out come responses; errors are
raised as they are and mapped in one place.
"""

# ruff: noqa: N802, ARG002 - the names and the signature are gRPC's

from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import grpc
from millrace.scheduler.v1 import scheduler_service_pb2 as messages
from millrace.scheduler.v1 import scheduler_service_pb2_grpc

from controlplane.api.context import ApiContext
from controlplane.api.declare import Declarer
from controlplane.api.deployments import Deployments
from controlplane.api.explain import explain
from controlplane.api.logs import Logs
from controlplane.api.namespaces import Namespaces
from controlplane.api.nodes import Nodes
from controlplane.api.plan import plan_deployments
from controlplane.api.watches import Watches

SERVICE_NAME = messages.DESCRIPTOR.services_by_name["SchedulerService"].full_name


class SchedulerServicer(scheduler_service_pb2_grpc.SchedulerServiceServicer):
    """Serves users and operators."""

    def __init__(self, context: ApiContext) -> None:
        self._context = context
        self._declarer = Declarer(context)
        self._deployments = Deployments(context)
        self._namespaces = Namespaces(context)
        self._nodes = Nodes(context)
        self._watches = Watches(context)
        self._logs = Logs(context)

    def register(self, server: grpc.aio.Server) -> None:
        """Adds the servicer to a server."""
        scheduler_service_pb2_grpc.add_SchedulerServiceServicer_to_server(self, server)

    async def DeclareDeployments(
        self, request: messages.DeclareDeploymentsRequest, context: Any
    ) -> messages.DeclareDeploymentsResponse:
        """Declares one or more models."""
        return await self._declarer.declare(request)

    async def GetDeployment(
        self, request: messages.GetDeploymentRequest, context: Any
    ) -> messages.GetDeploymentResponse:
        """Gets one deployment."""
        return self._deployments.get(request)

    async def ListDeployments(
        self, request: messages.ListDeploymentsRequest, context: Any
    ) -> messages.ListDeploymentsResponse:
        """Lists deployments."""
        return await self._deployments.list(request)

    async def WatchDeployments(
        self, request: messages.WatchDeploymentsRequest, context: Any
    ) -> AsyncIterator[messages.WatchDeploymentsResponse]:
        """Watches deployments."""
        async with aclosing(self._watches.deployments(request)) as stream:
            async for message in stream:
                yield message

    async def UpdateDeployment(
        self, request: messages.UpdateDeploymentRequest, context: Any
    ) -> messages.UpdateDeploymentResponse:
        """Changes a spec."""
        return await self._deployments.update(request)

    async def ScaleDeployment(
        self, request: messages.ScaleDeploymentRequest, context: Any
    ) -> messages.ScaleDeploymentResponse:
        """Changes the number of replicas."""
        return await self._deployments.scale(request)

    async def RestartDeployment(
        self, request: messages.RestartDeploymentRequest, context: Any
    ) -> messages.RestartDeploymentResponse:
        """Replaces every replica."""
        return await self._deployments.restart(request)

    async def DeleteDeployment(
        self, request: messages.DeleteDeploymentRequest, context: Any
    ) -> messages.DeleteDeploymentResponse:
        """Deletes a deployment and its keys."""
        return await self._deployments.delete(request)

    async def ExplainDeployment(
        self, request: messages.ExplainDeploymentRequest, context: Any
    ) -> messages.ExplainDeploymentResponse:
        """Explains where replicas are, or why they are nowhere."""
        return await explain(self._context, request)

    async def StreamDeploymentLogs(
        self, request: messages.StreamDeploymentLogsRequest, context: Any
    ) -> AsyncIterator[messages.StreamDeploymentLogsResponse]:
        """Streams log lines."""
        async with aclosing(self._logs.stream(request)) as stream:
            async for message in stream:
                yield message

    async def WatchEvents(
        self, request: messages.WatchEventsRequest, context: Any
    ) -> AsyncIterator[messages.WatchEventsResponse]:
        """Replays and follows events."""
        async with aclosing(self._watches.events(request)) as stream:
            async for message in stream:
                yield message

    async def ListNamespaces(
        self, request: messages.ListNamespacesRequest, context: Any
    ) -> messages.ListNamespacesResponse:
        """Lists namespaces."""
        return await self._namespaces.list(request)

    async def GetNamespace(
        self, request: messages.GetNamespaceRequest, context: Any
    ) -> messages.GetNamespaceResponse:
        """Gets one namespace."""
        return await self._namespaces.get(request)

    async def UpdateNamespace(
        self, request: messages.UpdateNamespaceRequest, context: Any
    ) -> messages.UpdateNamespaceResponse:
        """Changes quota and aliases of a namespace."""
        return await self._namespaces.update(request)

    async def ListNodes(self, request: messages.ListNodesRequest, context: Any) -> messages.ListNodesResponse:
        """Lists nodes."""
        return await self._nodes.list(request)

    async def GetNode(self, request: messages.GetNodeRequest, context: Any) -> messages.GetNodeResponse:
        """Gets one node."""
        return self._nodes.get(request)

    async def CordonNode(
        self, request: messages.CordonNodeRequest, context: Any
    ) -> messages.CordonNodeResponse:
        """Cordons a node, or takes it back."""
        return await self._nodes.cordon(request)

    async def DrainNode(self, request: messages.DrainNodeRequest, context: Any) -> messages.DrainNodeResponse:
        """Drains a node."""
        return await self._nodes.drain(request)

    async def UpdateNode(
        self, request: messages.UpdateNodeRequest, context: Any
    ) -> messages.UpdateNodeResponse:
        """Changes a node's labels and taints."""
        return await self._nodes.update(request)

    async def PlanDeployments(
        self, request: messages.PlanDeploymentsRequest, context: Any
    ) -> messages.PlanDeploymentsResponse:
        """Says what a declaration would take, and changes nothing."""
        return await plan_deployments(self._context, request)
