"""Nodes: list, get, cordon, drain.

In come requests, out go `spec/nodes` records and resources made of what fleet knows. A node exists once
an agent has reported it. Cordon and drain only say what operators want; moving replicas is the
reconciler's work.
"""

from collections.abc import Callable

from millrace.core.v1 import node_pb2
from millrace.scheduler.v1 import scheduler_service_pb2 as messages
from millrace.state.v1 import records_pb2

from controlplane.api import limits, validation
from controlplane.api.context import ApiContext
from controlplane.api.deployments import check_etag, next_token, read_page
from controlplane.api.paging import position_of
from controlplane.api.placement import check_labels, check_taints
from controlplane.api.view import node_not_found
from core.errors import Conflict
from core.store import keys
from core.store.types import Compare, Put

_CHANGEABLE = frozenset({"labels", "taints"})


class Nodes:
    """Reads nodes and says what operators want of them."""

    def __init__(self, context: ApiContext) -> None:
        self._context = context

    async def list(self, request: messages.ListNodesRequest) -> messages.ListNodesResponse:
        """Lists a page: which nodes there are and what they have as of one revision, the rest as of now.

        Raises:
            InvalidArgument: page_size or page_token is wrong.
            OutOfRange: The snapshot has been compacted.
        """
        size = validation.page_size_of(request.page_size)
        self._context.view.require_synced()
        position = position_of(request.page_token, keys.ACTUAL_NODES)
        page = await read_page(self._context.store, position, size)
        return messages.ListNodesResponse(
            nodes=[
                self._context.view.node(records_pb2.NodeObservationRecord.FromString(item.value))
                for item in page.items
            ],
            next_page_token=next_token(position, page),
            resource_version=str(page.revision),
        )

    def get(self, request: messages.GetNodeRequest) -> messages.GetNodeResponse:
        """Gets one node.

        Raises:
            NotFound: No agent has reported it.
        """
        return messages.GetNodeResponse(node=self._context.view.node(self._machine(request.name)))

    async def cordon(self, request: messages.CordonNodeRequest) -> messages.CordonNodeResponse:
        """Cordons a node, or takes cordon and drain back.

        Raises:
            NotFound: No agent has reported it.
            Conflict: The etag is not the current one.
        """

        def change(spec: node_pb2.NodeSpec) -> None:
            spec.cordoned = request.cordoned
            spec.draining = spec.draining and request.cordoned

        async def call() -> messages.CordonNodeResponse:
            return messages.CordonNodeResponse(node=await self._change(request, change))

        _check_request_id(request.request_id)
        return await self._context.memory.once(request.request_id, request, call)

    async def drain(self, request: messages.DrainNodeRequest) -> messages.DrainNodeResponse:
        """Cordons a node and has its replicas moved away.

        Raises:
            NotFound: No agent has reported it.
            Conflict: The etag is not the current one.
        """

        def change(spec: node_pb2.NodeSpec) -> None:
            spec.cordoned = True
            spec.draining = True

        async def call() -> messages.DrainNodeResponse:
            node = await self._change(request, change)
            moving = {
                f"{each.namespace}/{each.deployment}"
                for each in self._context.view.assignments.items.values()
                if each.node == request.name
            }
            return messages.DrainNodeResponse(node=node, moving=sorted(moving))

        _check_request_id(request.request_id)
        return await self._context.memory.once(request.request_id, request, call)

    async def update(self, request: messages.UpdateNodeRequest) -> messages.UpdateNodeResponse:
        """Replaces an operator's labels or taints of a node.

        Raises:
            InvalidArgument: A label, a taint or the mask is wrong.
            NotFound: No agent has reported it.
            Conflict: The etag is not the current one.
        """
        given = tuple(field.name for field, _ in request.spec.ListFields())
        paths = tuple(request.update_mask.paths) or given
        violations = validation.Violations()
        for path in paths:
            if path not in _CHANGEABLE:
                violations.add("update_mask", f"`{path[:80]}` cannot be changed here; use labels, taints")
        check_labels(request.spec.labels, "spec.labels", violations.add)
        check_taints(request.spec.taints, "spec.taints", violations.add)
        validation.check_request_id(request.request_id, violations)
        violations.raise_if_any()

        def change(spec: node_pb2.NodeSpec) -> None:
            if "labels" in paths:
                spec.ClearField("labels")
                spec.labels.update(request.spec.labels)
            if "taints" in paths:
                spec.ClearField("taints")
                spec.taints.extend(request.spec.taints)

        async def call() -> messages.UpdateNodeResponse:
            return messages.UpdateNodeResponse(node=await self._change(request, change))

        return await self._context.memory.once(request.request_id, request, call)

    async def _change(
        self,
        request: messages.CordonNodeRequest | messages.DrainNodeRequest | messages.UpdateNodeRequest,
        change: Callable[[node_pb2.NodeSpec], None],
    ) -> node_pb2.Node:
        context, name = self._context, request.name
        for _ in range(limits.COMMIT_ATTEMPTS_MAX):
            machine = self._machine(name)
            item = await context.store.get(keys.spec_node(name))
            revision = item.mod_revision if item is not None else 0
            check_etag(request.etag, str(revision), {"node": name})
            record = records_pb2.NodeRecord(node=name)
            if item is not None:
                record.ParseFromString(item.value)
            before = record.SerializeToString(deterministic=True)
            change(record.spec)
            after = record.SerializeToString(deterministic=True)
            if request.validate_only or before == after:
                return _with_spec(context.view.node(machine), record.spec, revision)
            commit = await context.store.commit(
                [Put(keys.spec_node(name), after)],
                compares=[Compare(keys.spec_node(name), mod_revision=revision)],
            )
            if not commit.succeeded:
                continue
            self._announce(name, records_pb2.NodeRecord.FromString(before).spec, record.spec)
            await context.view.wait_for_node_write(commit.revision)
            return _with_spec(context.view.node(machine), record.spec, commit.revision)
        raise Conflict(
            f"node `{name}` changed {limits.COMMIT_ATTEMPTS_MAX} times while this call tried; try again",
            metadata={"node": name},
        )

    def _announce(self, name: str, before: node_pb2.NodeSpec, spec: node_pb2.NodeSpec) -> None:
        reason, message = "NodeUncordoned", "takes replicas again"
        if (before.cordoned, before.draining) == (spec.cordoned, spec.draining):
            taints = ", ".join(sorted(f"{each.key}={each.value}" for each in spec.taints)) or "none"
            labels = ", ".join(f"{key}={value}" for key, value in sorted(spec.labels.items())) or "none"
            reason, message = "NodeChanged", f"labels: {labels}; taints: {taints}"
        elif spec.draining:
            reason, message = "NodeDraining", "takes no replicas; those that it has are moved away"
        elif spec.cordoned:
            reason, message = "NodeCordoned", "takes no new replicas"
        self._context.events.emit(namespace="", node=name, reason=reason, message=message, source="api")

    def _machine(self, name: str) -> records_pb2.NodeObservationRecord:
        self._context.view.require_synced()
        machine = self._context.view.machines.get(keys.actual_node(name))
        if machine is None:
            raise node_not_found(name)
        return machine


def _with_spec(node: node_pb2.Node, spec: node_pb2.NodeSpec, revision: int) -> node_pb2.Node:
    node.spec.CopyFrom(spec)
    node.etag = str(revision)
    return node


def _check_request_id(request_id: str) -> None:
    violations = validation.Violations()
    validation.check_request_id(request_id, violations)
    violations.raise_if_any()
