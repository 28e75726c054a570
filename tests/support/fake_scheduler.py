"""A SchedulerService that lives in memory: a real gRPC server with the real error mapping and access check.

In come the calls of a client under test, out come answers from dictionaries that the test fills and reads.
It knows nothing of nodes that run anything: a deployment becomes what the test says. Failures are injected
by method; watches can be cut and versions compacted.
"""

import asyncio
import secrets
import uuid
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.message import Message
from millrace.core.v1 import types_pb2
from millrace.core.v1.deployment_pb2 import Deployment, DeploymentSpec
from millrace.core.v1.event_pb2 import Event
from millrace.core.v1.node_pb2 import Node
from millrace.scheduler.v1 import scheduler_service_pb2 as messages
from millrace.scheduler.v1.scheduler_service_pb2_grpc import (
    SchedulerServiceServicer,
    add_SchedulerServiceServicer_to_server,
)

from core import errors
from core.identity import Principal, Role, TokenAuthenticator
from core.rpc import RpcServer, start_server
from tests.support.fake_namespaces import NAMESPACE_READS, NAMESPACE_WRITES, FakeNamespaces
from tests.support.fake_nodes import FakeNodes
from tests.support.fake_resources import declared_spec, sizing

SERVICE = "millrace.scheduler.v1.SchedulerService"
ADMIN_TOKEN = "admin-token-of-the-test"
VIEWER_TOKEN = "viewer-token-of-the-test"
WRITES = (
    "DeclareDeployments",
    "UpdateDeployment",
    "ScaleDeployment",
    "RestartDeployment",
    "DeleteDeployment",
)
READS = (
    "GetDeployment",
    "ListDeployments",
    "WatchDeployments",
    "ExplainDeployment",
    "StreamDeploymentLogs",
    "WatchEvents",
    "ListNodes",
    "GetNode",
    "PlanDeployments",
)
OPERATIONS = ("CordonNode", "DrainNode", "UpdateNode")

Key = tuple[str, str]


@dataclass(slots=True)
class _Watcher:
    queue: "asyncio.Queue[messages.WatchDeploymentsResponse | Exception]"
    namespace: str
    name: str

    def wants(self, deployment: Deployment) -> bool:
        return self.namespace in {"", deployment.namespace} and self.name in {"", deployment.name}


class FakeScheduler(FakeNodes, FakeNamespaces, SchedulerServiceServicer):
    """Holds deployments, nodes, events and log lines.

    Attributes:
        deployments: By namespace and name.
        nodes: By name.
        events: In order.
        log_lines: Lines of each deployment's replicas.
        requests: Every request that came, by method.
        explanation: Answer to every explain.
        page_size_max: Larger pages are cut to this.
        hanging: Methods that never answer.
        ready_at_once: A declared, updated or scaled deployment becomes READY by itself.
    """

    def __init__(self) -> None:
        self.deployments: dict[Key, Deployment] = {}
        self.nodes: dict[str, Node] = {}
        self.events: list[Event] = []
        self.log_lines: dict[Key, list[messages.StreamDeploymentLogsResponse]] = defaultdict(list)
        self.requests: dict[str, list[Any]] = defaultdict(list)
        self.explanation = messages.ExplainDeploymentResponse(
            summary="1 of 2 nodes can take one more replica",
            nodes=[
                messages.NodeExplanation(node="node-1", fits=True, message="fits", score=0.75),
                messages.NodeExplanation(
                    node="node-2", failed_rule="memory", message="needs 5.0 GiB, 1.0 GiB is free"
                ),
            ],
            sizing=sizing(),
        )
        self.page_size_max = 1000
        self.hanging: set[str] = set()
        self.ready_at_once = False
        self.revision = 100
        self._oldest_revision = 0
        self._history: list[messages.WatchDeploymentsResponse] = []
        self._watchers: list[_Watcher] = []
        self._event_watchers: list[asyncio.Queue[Event | Exception]] = []
        self._failures: dict[str, list[Exception]] = defaultdict(list)

    # What a test does to the world.

    def fail_next(self, method: str, *failures: Exception) -> None:
        """Makes the next calls of a method fail, one failure each."""
        self._failures[method].extend(failures)

    def add(self, namespace: str, name: str, **spec: Any) -> Deployment:
        """Puts a deployment that is ready."""
        deployment = Deployment(
            namespace=namespace,
            name=name,
            uid=str(uuid.uuid4()),
            generation=1,
            spec=DeploymentSpec(
                **{
                    "model": "/models/tiny",
                    "engine": types_pb2.ENGINE_VLLM,
                    "quantization": types_pb2.QUANTIZATION_NONE,
                    "replicas": 1,
                    **spec,
                }
            ),
        )
        deployment.create_time.GetCurrentTime()
        self._make_ready(deployment)
        self.put(deployment)
        return deployment

    def put(self, deployment: Deployment) -> None:
        """Stores a deployment with a new version and tells the watchers."""
        self.revision += 1
        stored = Deployment()
        stored.CopyFrom(deployment)
        stored.etag = str(self.revision)
        deployment.etag = stored.etag
        self.deployments[stored.namespace, stored.name] = stored
        self._tell(
            messages.WatchDeploymentsResponse(changed=stored, resource_version=str(self.revision)), stored
        )

    def remove(self, key: Key) -> None:
        """Removes a deployment and tells the watchers."""
        self.revision += 1
        gone = self.deployments.pop(key)
        named = Deployment(namespace=gone.namespace, name=gone.name)
        self._tell(
            messages.WatchDeploymentsResponse(deleted=named, resource_version=str(self.revision)), named
        )

    def emit(self, event: Event) -> None:
        """Adds an event and tells the watchers."""
        self.revision += 1
        self.events.append(event)
        for queue in self._event_watchers:
            queue.put_nowait(event)

    def cut_watches(self, failure: Exception | None = None) -> None:
        """Ends every watch with an error, as a restart would."""
        for watcher in self._watchers:
            watcher.queue.put_nowait(failure or errors.Unavailable("cut by the test"))
        for queue in self._event_watchers:
            queue.put_nowait(failure or errors.Unavailable("cut by the test"))

    def compact(self) -> None:
        """Forgets the history: no watch can resume from an earlier version."""
        self._oldest_revision = self.revision
        self._history.clear()

    @property
    def watching(self) -> int:
        """Open watches of deployments."""
        return len(self._watchers)

    @property
    def watching_events(self) -> int:
        """Open watches of events."""
        return len(self._event_watchers)

    def _tell(self, message: messages.WatchDeploymentsResponse, deployment: Deployment) -> None:
        self._history.append(message)
        for watcher in self._watchers:
            if watcher.wants(deployment):
                watcher.queue.put_nowait(message)

    async def _begin(self, method: str, request: Message) -> None:
        copy = type(request)()
        copy.CopyFrom(request)
        self.requests[method].append(copy)
        if method in self.hanging:
            await asyncio.Event().wait()
        if self._failures[method]:
            raise self._failures[method].pop(0)

    def _find(self, namespace: str, name: str) -> Deployment:
        found = self.deployments.get((namespace, name))
        if found is None:
            raise errors.NotFound(
                f"deployment {namespace}/{name} does not exist",
                metadata={"namespace": namespace, "deployment": name},
            )
        copy = Deployment()
        copy.CopyFrom(found)
        return copy

    def _make_ready(self, deployment: Deployment) -> None:
        replicas = deployment.spec.replicas if deployment.spec.HasField("replicas") else 1
        status = deployment.status
        status.observed_generation = deployment.generation
        status.phase = types_pb2.DEPLOYMENT_PHASE_READY if replicas else types_pb2.DEPLOYMENT_PHASE_STOPPED
        status.ready_replicas = status.desired_replicas = replicas

    def _check_etag(self, deployment: Deployment, etag: str) -> None:
        if etag and etag != deployment.etag:
            raise errors.Conflict(
                f"etag {etag} is not the current {deployment.etag}", reason="ERROR_REASON_ETAG_MISMATCH"
            )

    # The service.

    async def DeclareDeployments(  # noqa: N802 - the contract's spelling
        self, request: messages.DeclareDeploymentsRequest, context: Any
    ) -> messages.DeclareDeploymentsResponse:
        await self._begin("DeclareDeployments", request)
        namespace = request.namespace or f"ns-{secrets.token_hex(4)}"
        for position, model in enumerate(request.models):
            if model.model == "/models/none":
                raise errors.InvalidArgument.of(
                    f"models[{position}].model",
                    "there is no such directory",
                    reason="ERROR_REASON_MODEL_NOT_FOUND",
                )
            if (namespace, model.name) in self.deployments:
                raise errors.AlreadyExists(f"deployment {namespace}/{model.name} exists already")
        declared = []
        for model in request.models:
            deployment = Deployment(
                namespace=namespace,
                name=model.name,
                uid=str(uuid.uuid4()),
                generation=1,
                metadata=request.metadata if request.HasField("metadata") else None,
                spec=declared_spec(model),
            )
            deployment.create_time.GetCurrentTime()
            deployment.status.phase = types_pb2.DEPLOYMENT_PHASE_PENDING
            if self.ready_at_once:
                self._make_ready(deployment)
            if not request.validate_only:
                self.put(deployment)
            declared.append(
                messages.DeclaredDeployment(
                    deployment=deployment,
                    endpoint="http://127.0.0.1:8080/v1",
                    api_key="" if request.validate_only else f"sk-{secrets.token_hex(8)}",
                    watch_url=f"ws://127.0.0.1:7601/v1/deployments/{namespace}/{model.name}/watch",
                    sizing=sizing(),
                )
            )
        return messages.DeclareDeploymentsResponse(namespace=namespace, deployments=declared)

    async def GetDeployment(  # noqa: N802 - the contract's spelling
        self, request: messages.GetDeploymentRequest, context: Any
    ) -> messages.GetDeploymentResponse:
        await self._begin("GetDeployment", request)
        return messages.GetDeploymentResponse(deployment=self._find(request.namespace, request.name))

    async def ListDeployments(  # noqa: N802 - the contract's spelling
        self, request: messages.ListDeploymentsRequest, context: Any
    ) -> messages.ListDeploymentsResponse:
        await self._begin("ListDeployments", request)
        keys = [key for key in sorted(self.deployments) if request.namespace in {"", key[0]}]
        start = int(request.page_token or 0)
        end = start + min(request.page_size or 50, self.page_size_max)
        return messages.ListDeploymentsResponse(
            deployments=[self.deployments[key] for key in keys[start:end]],
            next_page_token=str(end) if end < len(keys) else "",
            resource_version=str(self.revision),
        )

    async def WatchDeployments(  # noqa: N802 - the contract's spelling
        self, request: messages.WatchDeploymentsRequest, context: Any
    ) -> AsyncIterator[messages.WatchDeploymentsResponse]:
        await self._begin("WatchDeployments", request)
        watcher = _Watcher(asyncio.Queue(), request.namespace, request.name)
        self._watchers.append(watcher)
        try:
            if request.resource_version:
                after = int(request.resource_version)
                if after < self._oldest_revision:
                    raise errors.OutOfRange(f"version {after} is gone")
                for message in [*self._history]:
                    subject = message.changed if message.HasField("changed") else message.deleted
                    if int(message.resource_version) > after and watcher.wants(subject):
                        yield message
            else:
                version = str(self.revision)
                for deployment in [*self.deployments.values()]:
                    if watcher.wants(deployment):
                        yield messages.WatchDeploymentsResponse(changed=deployment, resource_version=version)
                yield messages.WatchDeploymentsResponse(snapshot_end=True, resource_version=version)
            while True:
                item = await watcher.queue.get()
                if isinstance(item, Exception):
                    raise item
                yield item
        finally:
            self._watchers.remove(watcher)

    async def UpdateDeployment(  # noqa: N802 - the contract's spelling
        self, request: messages.UpdateDeploymentRequest, context: Any
    ) -> messages.UpdateDeploymentResponse:
        await self._begin("UpdateDeployment", request)
        deployment = self._find(request.namespace, request.name)
        self._check_etag(deployment, request.etag)
        mask: FieldMask = request.update_mask
        paths = [*mask.paths] or [each.name for each, _ in request.spec.ListFields()]
        for path in paths:
            deployment.spec.ClearField(path)  # type: ignore[arg-type] # the mask's paths are field names
        partial = DeploymentSpec()
        FieldMask(paths=paths).MergeMessage(request.spec, partial)
        deployment.spec.MergeFrom(partial)
        deployment.generation += 1
        if self.ready_at_once:
            self._make_ready(deployment)
        if not request.validate_only:
            self.put(deployment)
        return messages.UpdateDeploymentResponse(deployment=deployment)

    async def ScaleDeployment(  # noqa: N802 - the contract's spelling
        self, request: messages.ScaleDeploymentRequest, context: Any
    ) -> messages.ScaleDeploymentResponse:
        await self._begin("ScaleDeployment", request)
        deployment = self._find(request.namespace, request.name)
        deployment.spec.replicas = request.replicas
        deployment.generation += 1
        if self.ready_at_once:
            self._make_ready(deployment)
        self.put(deployment)
        return messages.ScaleDeploymentResponse(deployment=deployment)

    async def RestartDeployment(  # noqa: N802 - the contract's spelling
        self, request: messages.RestartDeploymentRequest, context: Any
    ) -> messages.RestartDeploymentResponse:
        await self._begin("RestartDeployment", request)
        deployment = self._find(request.namespace, request.name)
        deployment.generation += 1
        if self.ready_at_once:
            self._make_ready(deployment)
        self.put(deployment)
        return messages.RestartDeploymentResponse(deployment=deployment)

    async def DeleteDeployment(  # noqa: N802 - the contract's spelling
        self, request: messages.DeleteDeploymentRequest, context: Any
    ) -> messages.DeleteDeploymentResponse:
        await self._begin("DeleteDeployment", request)
        self._find(request.namespace, request.name)
        self.remove((request.namespace, request.name))
        return messages.DeleteDeploymentResponse()

    async def ExplainDeployment(  # noqa: N802 - the contract's spelling
        self, request: messages.ExplainDeploymentRequest, context: Any
    ) -> messages.ExplainDeploymentResponse:
        await self._begin("ExplainDeployment", request)
        self._find(request.namespace, request.name)
        return self.explanation

    async def StreamDeploymentLogs(  # noqa: N802 - the contract's spelling
        self, request: messages.StreamDeploymentLogsRequest, context: Any
    ) -> AsyncIterator[messages.StreamDeploymentLogsResponse]:
        await self._begin("StreamDeploymentLogs", request)
        self._find(request.namespace, request.name)
        lines = self.log_lines[request.namespace, request.name]
        for line in lines[-(request.tail_lines or 100) :]:
            if request.replica in {"", line.replica}:
                yield line
        if request.follow:
            await asyncio.Event().wait()

    async def WatchEvents(  # noqa: N802 - the contract's spelling
        self, request: messages.WatchEventsRequest, context: Any
    ) -> AsyncIterator[messages.WatchEventsResponse]:
        await self._begin("WatchEvents", request)
        queue: asyncio.Queue[Event | Exception] = asyncio.Queue()
        self._event_watchers.append(queue)

        def wanted(event: Event) -> bool:
            return request.namespace in {"", event.namespace} and request.deployment in {"", event.deployment}

        try:
            for event in [*self.events]:
                if wanted(event) and event.id > request.resource_version:
                    yield messages.WatchEventsResponse(event=event, resource_version=event.id)
            last = self.events[-1].id if self.events else request.resource_version
            if not request.resource_version:
                yield messages.WatchEventsResponse(snapshot_end=True, resource_version=last)
            while request.follow:
                item = await queue.get()
                if isinstance(item, Exception):
                    raise item
                if wanted(item):
                    yield messages.WatchEventsResponse(event=item, resource_version=item.id)
        finally:
            self._event_watchers.remove(queue)

    async def ListNodes(  # noqa: N802 - the contract's spelling
        self, request: messages.ListNodesRequest, context: Any
    ) -> messages.ListNodesResponse:
        await self._begin("ListNodes", request)
        names = sorted(self.nodes)
        start = int(request.page_token or 0)
        end = start + min(request.page_size or 50, self.page_size_max)
        return messages.ListNodesResponse(
            nodes=[self.nodes[name] for name in names[start:end]],
            next_page_token=str(end) if end < len(names) else "",
            resource_version=str(self.revision),
        )

    async def GetNode(  # noqa: N802 - the contract's spelling
        self, request: messages.GetNodeRequest, context: Any
    ) -> messages.GetNodeResponse:
        await self._begin("GetNode", request)
        return messages.GetNodeResponse(node=self._node(request.name))

    async def CordonNode(  # noqa: N802 - the contract's spelling
        self, request: messages.CordonNodeRequest, context: Any
    ) -> messages.CordonNodeResponse:
        await self._begin("CordonNode", request)
        node = self._node(request.name)
        node.spec.cordoned = request.cordoned
        node.spec.draining = node.spec.draining and request.cordoned
        return messages.CordonNodeResponse(node=node)

    async def DrainNode(  # noqa: N802 - the contract's spelling
        self, request: messages.DrainNodeRequest, context: Any
    ) -> messages.DrainNodeResponse:
        await self._begin("DrainNode", request)
        node = self._node(request.name)
        node.spec.cordoned = node.spec.draining = True
        moving = sorted(
            f"{each.namespace}/{each.name}"
            for each in self.deployments.values()
            if any(replica.node == request.name for replica in each.status.replicas)
        )
        return messages.DrainNodeResponse(node=node, moving=moving)


@dataclass(slots=True)
class ServedScheduler:
    """A fake with the server around it."""

    fake: FakeScheduler
    server: RpcServer
    target: str = field(init=False)

    def __post_init__(self) -> None:
        self.target = f"127.0.0.1:{self.server.port}"


@asynccontextmanager
async def serve_scheduler(fake: FakeScheduler, *, port: int = 0) -> AsyncIterator[ServedScheduler]:
    """Serves a fake on 127.0.0.1; the admin token may do everything, the viewer token may read."""
    policy = {f"/{SERVICE}/{method}": Role.VIEWER for method in (*READS, *NAMESPACE_READS)}
    policy |= {f"/{SERVICE}/{method}": Role.OPERATOR for method in (*WRITES, *OPERATIONS, *NAMESPACE_WRITES)}
    server = await start_server(
        host="127.0.0.1",
        port=port,
        register=lambda rpc_server: add_SchedulerServiceServicer_to_server(fake, rpc_server),
        service_names=(SERVICE,),
        authenticator=TokenAuthenticator(
            {
                ADMIN_TOKEN: Principal("admin", Role.ADMIN),
                VIEWER_TOKEN: Principal("viewer", Role.VIEWER),
            }
        ),
        policy=policy,
    )
    try:
        yield ServedScheduler(fake, server)
    finally:
        await server.stop(grace_seconds=0)
