"""The client: one method for each thing that Millrace can be asked, over one gRPC channel.

In come names and protobuf messages of the contract, out come protobuf messages of the contract, or an
error of `errors`. Every call has a deadline, only UNAVAILABLE is retried (see `calling`), and watches
resume by themselves (see `following`). It keeps no state besides the channel, never logs, and must not
hold knowledge of where a server is: that is `context`.
"""

import uuid
from collections.abc import AsyncGenerator, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import grpc
from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.struct_pb2 import Struct
from millrace.core.v1.deployment_pb2 import Deployment, DeploymentSpec
from millrace.core.v1.event_pb2 import Event
from millrace.core.v1.node_pb2 import Node, NodeSpec
from millrace.scheduler.v1 import scheduler_service_pb2 as messages
from millrace.scheduler.v1.scheduler_service_pb2_grpc import SchedulerServiceStub

from millrace_client import errors, following
from millrace_client.calling import Caller, Metadata
from millrace_client.namespaces import NamespaceCalls

# Reads and small writes take milliseconds; ten seconds leave room for retries over a short outage.
TIMEOUT_SECONDS = 10.0
# A declaration reads the models' configurations, possibly from a slow disk or a hub.
DECLARE_TIMEOUT_SECONDS = 60.0
# The largest page that the server gives: the fewest round trips for a whole list.
PAGE_SIZE = 1000
# An endless list is a broken server: a million entries are beyond any cluster.
PAGES_MAX = 1000
MESSAGE_BYTES_MAX = 8 * 1024 * 1024

_CHANNEL_OPTIONS = (
    ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
    # A dead peer of a watch is noticed within 20 s even when nothing is sent.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 1_000),
    ("grpc.max_reconnect_backoff_ms", 2_000),
)


class MillraceClient(NamespaceCalls):
    """Talks to one Millrace.

    ```python
    async with MillraceClient.connect("127.0.0.1:7600", token) as client:
        for deployment in await client.list("team-ai"):
            print(deployment.name, deployment.status.ready_replicas)
    ```

    Every method raises an error of `millrace_client.errors` when the server refuses or does not answer.
    """

    def __init__(
        self,
        channel: grpc.aio.Channel,
        *,
        target: str,
        token: str = "",
        timeout_seconds: float = TIMEOUT_SECONDS,
    ) -> None:
        """Takes over a channel; `connect` is the usual way in."""
        self._channel = channel
        self._token = token
        self._stub = SchedulerServiceStub(channel)
        self._caller = Caller(target, self._metadata, timeout_seconds)

    @classmethod
    def connect(
        cls,
        target: str,
        token: str = "",
        *,
        tls: bool = False,
        tls_authority: Path | None = None,
        tls_certificate: Path | None = None,
        tls_key: Path | None = None,
        timeout_seconds: float = TIMEOUT_SECONDS,
    ) -> Self:
        """Opens a channel; nothing is sent before the first call.

        Must be called where an event loop runs.

        Args:
            target: host:port of the control plane.
            token: Bearer token; empty sends none.
            tls: Speak TLS with the system's authorities. Implied by any file below.
            tls_authority: PEM file of the authority that signed the server's certificate.
            tls_certificate: PEM file of our own certificate, for mutual TLS.
            tls_key: PEM file of our own key.
            timeout_seconds: Budget of a call with all its attempts.

        Raises:
            OSError: A TLS file cannot be read.
        """
        options = list(_CHANNEL_OPTIONS)
        if _is_loopback(target):
            # A proxy of the environment cannot reach this machine.
            options.append(("grpc.enable_http_proxy", 0))
        if tls or tls_authority or tls_certificate or tls_key:
            credentials = grpc.ssl_channel_credentials(
                root_certificates=tls_authority.read_bytes() if tls_authority else None,
                private_key=tls_key.read_bytes() if tls_key else None,
                certificate_chain=tls_certificate.read_bytes() if tls_certificate else None,
            )
            channel = grpc.aio.secure_channel(target, credentials, options=options)
        else:
            channel = grpc.aio.insecure_channel(target, options=options)
        return cls(channel, target=target, token=token, timeout_seconds=timeout_seconds)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Ends every call and closes the channel."""
        await self._channel.close()

    def _metadata(self) -> Metadata:
        return (("authorization", f"Bearer {self._token}"),) if self._token else ()

    async def declare(
        self,
        models: Iterable[messages.DeclaredModel],
        *,
        namespace: str = "",
        metadata: Mapping[str, Any] | None = None,
        validate_only: bool = False,
        timeout_seconds: float = DECLARE_TIMEOUT_SECONDS,
    ) -> messages.DeclareDeploymentsResponse:
        """Declares models, all of them or none.

        Args:
            models: What to serve; engine, quantization and sizes may be left to the server.
            namespace: Tenant; empty has one generated.
            metadata: The caller's own labels, JSON values only.
            validate_only: Check and size, and change nothing.
            timeout_seconds: Budget of the call.

        Returns:
            For each model the endpoint, the key (shown this once) and the sizing.

        Raises:
            InvalidArgument: A field is wrong.
            AlreadyExists: One of the names is taken; use `update`.
            FailedPrecondition: No node could ever hold the model.
        """
        labels = Struct()
        labels.update(dict(metadata or {}))
        request = messages.DeclareDeploymentsRequest(
            models=models,
            namespace=namespace,
            metadata=labels if metadata else None,
            request_id=_request_id(),
            validate_only=validate_only,
        )
        return await self._caller.call(
            self._stub.DeclareDeployments, request, timeout_seconds=timeout_seconds
        )

    async def get(self, namespace: str, name: str) -> Deployment:
        """Gets one deployment.

        Raises:
            NotFound: There is none.
        """
        request = messages.GetDeploymentRequest(namespace=namespace, name=name)
        return (await self._caller.call(self._stub.GetDeployment, request)).deployment

    async def list(self, namespace: str = "") -> tuple[Deployment, ...]:
        """Lists the deployments of a namespace, or of all: one consistent snapshot, every page of it."""
        found: tuple[Deployment, ...] = ()
        token = ""
        for _ in range(PAGES_MAX):
            request = messages.ListDeploymentsRequest(
                namespace=namespace, page_size=PAGE_SIZE, page_token=token
            )
            page = await self._caller.call(self._stub.ListDeployments, request)
            found += tuple(page.deployments)
            token = page.next_page_token
            if not token:
                return found
        raise errors.ServerFault(f"the list of deployments does not end after {PAGES_MAX} pages")

    def watch(
        self,
        namespace: str = "",
        name: str = "",
        *,
        resource_version: str = "",
        patience_seconds: float = following.PATIENCE_SECONDS,
    ) -> AsyncGenerator[following.DeploymentChange, None]:
        """Watches deployments, without end.

        Begins with everything that exists, then SYNCED, then changes. A broken connection is resumed
        after the last version; if that version is gone, the snapshot and SYNCED come again, with DELETED
        for what vanished meanwhile.

        Args:
            namespace: Tenant; empty watches all.
            name: Deployment; empty watches all of the namespace.
            resource_version: Begin with the changes after this version instead of a snapshot.
            patience_seconds: How long the server may be away before Unavailable is raised.
        """
        return following.follow_deployments(
            self._stub,
            self._caller,
            namespace=namespace,
            name=name,
            resource_version=resource_version,
            patience_seconds=patience_seconds,
        )

    async def update(
        self,
        namespace: str,
        name: str,
        spec: DeploymentSpec,
        *,
        fields: Iterable[str] = (),
        etag: str = "",
        validate_only: bool = False,
        timeout_seconds: float = DECLARE_TIMEOUT_SECONDS,
    ) -> Deployment:
        """Changes a spec; running replicas are replaced one by one.

        Args:
            namespace: Tenant.
            name: Deployment.
            spec: New values.
            fields: Fields of the spec to change; none given changes the populated ones, `*` replaces all.
            etag: Version that the change is based on; empty takes the current one.
            validate_only: Check and size, and change nothing.
            timeout_seconds: Budget of the call.

        Raises:
            NotFound: There is none.
            Conflict: The etag is not the current one.
            InvalidArgument: A field is wrong.
        """
        paths = [*fields]
        request = messages.UpdateDeploymentRequest(
            namespace=namespace,
            name=name,
            spec=spec,
            update_mask=FieldMask(paths=paths) if paths else None,
            etag=etag,
            request_id=_request_id(),
            validate_only=validate_only,
        )
        response = await self._caller.call(
            self._stub.UpdateDeployment, request, timeout_seconds=timeout_seconds
        )
        return response.deployment

    async def scale(
        self, namespace: str, name: str, replicas: int, *, etag: str = "", validate_only: bool = False
    ) -> Deployment:
        """Sets the number of replicas; 0 stops the deployment.

        Raises:
            NotFound: There is none.
            Conflict: The etag is not the current one.
            InvalidArgument: The number is out of range.
        """
        request = messages.ScaleDeploymentRequest(
            namespace=namespace,
            name=name,
            replicas=replicas,
            etag=etag,
            request_id=_request_id(),
            validate_only=validate_only,
        )
        return (await self._caller.call(self._stub.ScaleDeployment, request)).deployment

    async def restart(
        self, namespace: str, name: str, *, etag: str = "", validate_only: bool = False
    ) -> Deployment:
        """Has every replica replaced by a new one of the same spec; tries a spec again that was rolled back.

        Raises:
            NotFound: There is none.
            Conflict: The etag is not the current one.
        """
        request = messages.RestartDeploymentRequest(
            namespace=namespace,
            name=name,
            etag=etag,
            request_id=_request_id(),
            validate_only=validate_only,
        )
        return (await self._caller.call(self._stub.RestartDeployment, request)).deployment

    async def delete(self, namespace: str, name: str, *, etag: str = "", validate_only: bool = False) -> None:
        """Deletes a deployment and its keys; its replicas drain and stop.

        Raises:
            NotFound: There is none.
            Conflict: The etag is not the current one.
        """
        request = messages.DeleteDeploymentRequest(
            namespace=namespace,
            name=name,
            etag=etag,
            request_id=_request_id(),
            validate_only=validate_only,
        )
        await self._caller.call(self._stub.DeleteDeployment, request)

    async def explain(self, namespace: str, name: str) -> messages.ExplainDeploymentResponse:
        """Explains, node by node, why replicas are where they are or cannot be placed.

        Raises:
            NotFound: There is none.
        """
        request = messages.ExplainDeploymentRequest(namespace=namespace, name=name)
        return await self._caller.call(self._stub.ExplainDeployment, request)

    def logs(
        self, namespace: str, name: str, *, replica: str = "", tail_lines: int = 0, follow: bool = False
    ) -> AsyncGenerator[messages.StreamDeploymentLogsResponse, None]:
        """Streams the log lines of a deployment's engines.

        Args:
            namespace: Tenant.
            name: Deployment.
            replica: Only this one; empty takes all.
            tail_lines: Lines from the end to begin with, a replica; 0 takes the server's default (100).
            follow: Go on with new lines, and with replicas that come later.
        """
        request = messages.StreamDeploymentLogsRequest(
            namespace=namespace, name=name, replica=replica, tail_lines=tail_lines, follow=follow
        )
        return following.read_logs(self._stub, self._caller, request)

    def events(
        self,
        namespace: str = "",
        deployment: str = "",
        *,
        follow: bool = False,
        resource_version: str = "",
        patience_seconds: float = following.PATIENCE_SECONDS,
    ) -> AsyncGenerator[Event, None]:
        """Yields the kept events and, with `follow`, new ones without end.

        Args:
            namespace: Tenant; empty takes all.
            deployment: Only what speaks of it; empty takes all of the namespace.
            follow: Go on with new events, over broken connections too.
            resource_version: Begin after this version instead of with the kept events.
            patience_seconds: How long the server may be away before Unavailable is raised.
        """
        return following.follow_events(
            self._stub,
            self._caller,
            namespace=namespace,
            deployment=deployment,
            follow=follow,
            resource_version=resource_version,
            patience_seconds=patience_seconds,
        )

    async def plan(
        self,
        models: Iterable[messages.DeclaredModel],
        *,
        namespace: str = "",
        timeout_seconds: float = DECLARE_TIMEOUT_SECONDS,
    ) -> messages.PlanDeploymentsResponse:
        """Says what a declaration would take, whom it would pre-empt and why, and changes nothing.

        Args:
            models: As `declare` takes them; a name that exists is planned as an update.
            namespace: Tenant; empty plans for one without deployments or quota.
            timeout_seconds: Budget of the call; sizing may have to read configurations from a hub.

        Raises:
            InvalidArgument: A field is wrong.
            FailedPrecondition: No node, or the quota, could ever hold a model.
        """
        request = messages.PlanDeploymentsRequest(models=models, namespace=namespace)
        return await self._caller.call(self._stub.PlanDeployments, request, timeout_seconds=timeout_seconds)

    async def nodes(self) -> tuple[Node, ...]:
        """Lists the nodes, every page of them."""
        found: tuple[Node, ...] = ()
        token = ""
        for _ in range(PAGES_MAX):
            request = messages.ListNodesRequest(page_size=PAGE_SIZE, page_token=token)
            page = await self._caller.call(self._stub.ListNodes, request)
            found += tuple(page.nodes)
            token = page.next_page_token
            if not token:
                return found
        raise errors.ServerFault(f"the list of nodes does not end after {PAGES_MAX} pages")

    async def node(self, name: str) -> Node:
        """Gets one node.

        Raises:
            NotFound: There is none.
        """
        request = messages.GetNodeRequest(name=name)
        return (await self._caller.call(self._stub.GetNode, request)).node

    async def cordon(
        self, name: str, *, cordoned: bool = True, etag: str = "", validate_only: bool = False
    ) -> Node:
        """Stops placing replicas on a node, or takes cordon and drain back.

        Raises:
            NotFound: There is none.
            Conflict: The etag is not the current one.
        """
        request = messages.CordonNodeRequest(
            name=name, cordoned=cordoned, etag=etag, request_id=_request_id(), validate_only=validate_only
        )
        return (await self._caller.call(self._stub.CordonNode, request)).node

    async def update_node(
        self,
        name: str,
        spec: NodeSpec,
        *,
        fields: Iterable[str],
        etag: str = "",
        validate_only: bool = False,
    ) -> Node:
        """Replaces an operator's labels or taints of a node, each as a whole.

        Args:
            name: Node.
            spec: New values.
            fields: `labels`, `taints`, or both.
            etag: Version that the change is based on; empty takes the current one.
            validate_only: Check, and change nothing.

        Raises:
            NotFound: There is none.
            Conflict: The etag is not the current one.
            InvalidArgument: A label or taint is wrong.
        """
        request = messages.UpdateNodeRequest(
            name=name,
            spec=spec,
            update_mask=FieldMask(paths=list(fields)),
            etag=etag,
            request_id=_request_id(),
            validate_only=validate_only,
        )
        return (await self._caller.call(self._stub.UpdateNode, request)).node

    async def drain(
        self, name: str, *, etag: str = "", validate_only: bool = False
    ) -> messages.DrainNodeResponse:
        """Cordons a node and moves its replicas away; `moving` names the deployments that move.

        Raises:
            NotFound: There is none.
            Conflict: The etag is not the current one.
        """
        request = messages.DrainNodeRequest(
            name=name, etag=etag, request_id=_request_id(), validate_only=validate_only
        )
        return await self._caller.call(self._stub.DrainNode, request)


def _request_id() -> str:
    """One id a mutation: its retries change nothing twice."""
    return str(uuid.uuid4())


def _is_loopback(target: str) -> bool:
    host = target.rpartition(":")[0].strip("[]")
    return host in {"localhost", "::1"} or host.startswith("127.")
