"""What the loop reads: the records of a moment, by key, and which of them have changed.

`ClusterView` holds one mirror for each prefix; `View` is what they held at one moment, so that everything
decided in one round rests on the same records. `take_changes` tells what the next look has to read again.
It writes nothing.
"""

import asyncio
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from google.protobuf.message import Message
from millrace.core.v1 import endpoint_pb2, replica_pb2
from millrace.state.v1 import records_pb2

from core.clock import Clock
from core.store import Store, keys
from core.store.mirror import Mirror

M = TypeVar("M", bound=Message)


@dataclass(frozen=True, slots=True)
class View:
    """The records of one moment, by full key.

    Attributes:
        deployments: What users want.
        node_specs: What operators want of nodes.
        conclusions: What the loop concluded before.
        assignments: What the loop ordered before.
        nodes: What fleet knows of nodes.
        observations: What agents report of replicas.
        endpoints: What routers use.
        namespaces: What operators want of tenants.
        served: What routers know of deployments.
        revisions: Revision of the last write of the keys that the loop writes or depends on.
        grouped: Assignments, observations and endpoints by deployment; None where nobody keeps them so.
    """

    deployments: Mapping[str, records_pb2.DeploymentRecord] = field(default_factory=dict)
    node_specs: Mapping[str, records_pb2.NodeRecord] = field(default_factory=dict)
    conclusions: Mapping[str, records_pb2.DeploymentPlanRecord] = field(default_factory=dict)
    assignments: Mapping[str, replica_pb2.ReplicaAssignment] = field(default_factory=dict)
    nodes: Mapping[str, records_pb2.NodeObservationRecord] = field(default_factory=dict)
    observations: Mapping[str, replica_pb2.ReplicaObservation] = field(default_factory=dict)
    endpoints: Mapping[str, endpoint_pb2.Endpoint] = field(default_factory=dict)
    namespaces: Mapping[str, records_pb2.NamespaceRecord] = field(default_factory=dict)
    served: Mapping[str, records_pb2.ServedDeploymentRecord] = field(default_factory=dict)
    revisions: Callable[[str], int] = lambda _: 0
    grouped: "Grouped | None" = None


class Grouped:
    """Records below deployments, by prefix, `namespace/deployment` and replica; kept as they change."""

    PREFIXES = (keys.PLAN_REPLICAS, keys.ACTUAL_REPLICAS, keys.SERVE_ENDPOINTS)

    def __init__(self, view: View | None = None) -> None:
        self._of: dict[str, dict[str, dict[str, Message]]] = {prefix: {} for prefix in self.PREFIXES}
        if view is not None:
            listed: tuple[Mapping[str, Message], ...] = (view.assignments, view.observations, view.endpoints)
            for prefix, items in zip(self.PREFIXES, listed, strict=True):
                for key, value in items.items():
                    self.set(prefix, key, value)

    def of(self, prefix: str, name: str) -> Mapping[str, Message]:
        """Records of a deployment under a prefix, by replica."""
        return self._of[prefix].get(name, {})

    def names(self, prefix: str) -> Iterable[str]:
        """Deployments with records under a prefix."""
        return self._of[prefix]

    def set(self, prefix: str, key: str, value: Message | None) -> None:
        """Takes a record's present value; None when it is gone."""
        name, _, replica = key.removeprefix(prefix).rpartition("/")
        group = self._of[prefix].setdefault(name, {})
        if value is None:
            group.pop(replica, None)
        else:
            group[replica] = value
        if not group:
            del self._of[prefix][name]


class ClusterView:
    """Mirrors of everything that the loop reads. `run` must be running."""

    def __init__(self, store: Store, clock: Clock) -> None:
        def mirror(prefix: str, kind: type[M]) -> Mirror[M]:
            name = f"reconciler {prefix.removeprefix(keys.ROOT).rstrip('/')}"
            return Mirror(store, prefix, kind.FromString, name=name, clock=clock)

        self._deployments = mirror(keys.SPEC_DEPLOYMENTS, records_pb2.DeploymentRecord)
        self._node_specs = mirror(keys.SPEC_NODES, records_pb2.NodeRecord)
        self._conclusions = mirror(keys.PLAN_DEPLOYMENTS, records_pb2.DeploymentPlanRecord)
        self._assignments = mirror(keys.PLAN_REPLICAS, replica_pb2.ReplicaAssignment)
        self._nodes = mirror(keys.ACTUAL_NODES, records_pb2.NodeObservationRecord)
        self._observations = mirror(keys.ACTUAL_REPLICAS, replica_pb2.ReplicaObservation)
        self._endpoints = mirror(keys.SERVE_ENDPOINTS, endpoint_pb2.Endpoint)
        self._namespaces = mirror(keys.SPEC_NAMESPACES, records_pb2.NamespaceRecord)
        self._served = mirror(keys.SERVE_DEPLOYMENTS, records_pb2.ServedDeploymentRecord)
        self._grouped = Grouped()
        # A key stands here once, however often it changes: the bound is the number of records.
        self._changed: set[str] = set()
        self._by_prefix: dict[str, Mirror[Any]] = {
            keys.SPEC_DEPLOYMENTS: self._deployments,
            keys.SPEC_NODES: self._node_specs,
            keys.PLAN_DEPLOYMENTS: self._conclusions,
            keys.PLAN_REPLICAS: self._assignments,
            keys.ACTUAL_NODES: self._nodes,
            keys.ACTUAL_REPLICAS: self._observations,
            keys.SERVE_ENDPOINTS: self._endpoints,
            keys.SPEC_NAMESPACES: self._namespaces,
            keys.SERVE_DEPLOYMENTS: self._served,
        }
        for each in self._by_prefix.values():
            each.subscribe(self._changed.update)

    def subscribe(self, wake: Callable[[], None]) -> None:
        """Has a function called after every change of any prefix."""
        for mirror in self._by_prefix.values():
            mirror.subscribe(lambda _changed: wake())

    async def run(self) -> None:
        """Keeps all mirrors running until cancelled."""
        async with asyncio.TaskGroup() as group:
            for mirror in self._by_prefix.values():
                group.create_task(mirror.run(), name=mirror.name)

    async def wait_synced(self, timeout_seconds: float) -> None:
        """Waits for the first listing of every prefix.

        Raises:
            StoreUnavailable: It did not come in time.
        """
        for mirror in self._by_prefix.values():
            await mirror.wait_synced(timeout_seconds)

    async def wait_for(self, written: Mapping[str, int], timeout_seconds: float) -> None:
        """Waits until own writes are visible.

        Each prefix is waited for up to its own last write: of writes to others it hears only when the
        store is idle.

        Args:
            written: Keys, each with the revision at which it was committed.
            timeout_seconds: For each prefix.

        Raises:
            StoreUnavailable: They did not come in time.
        """
        for prefix, mirror in self._by_prefix.items():
            revision = max((at for key, at in written.items() if key.startswith(prefix)), default=0)
            if revision:
                await mirror.wait_for_revision(revision, timeout_seconds)

    def take(self) -> View:
        """The records of this moment; later changes do not touch them.

        `revisions` and `grouped` alone stay live: they are to be read before the next await.
        """
        return View(
            deployments=self._deployments.items,
            node_specs=self._node_specs.items,
            conclusions=self._conclusions.items,
            assignments=self._assignments.items,
            nodes=self._nodes.items,
            observations=self._observations.items,
            endpoints=self._endpoints.items,
            namespaces=self._namespaces.items,
            served=self._served.items,
            revisions=self._revision_of,
            grouped=self._grouped,
        )

    def take_changes(self) -> frozenset[str]:
        """Keys that have changed since the last call; all of them at the first."""
        changed = frozenset(self._changed)
        self._changed.clear()
        for prefix in Grouped.PREFIXES:
            mirror = self._by_prefix[prefix]
            for key in changed:
                if key.startswith(prefix):
                    self._grouped.set(prefix, key, mirror.get(key))
        return changed

    def forget_changes(self) -> None:
        """Has the next `take_changes` name every key, for whoever lost track."""
        for mirror in self._by_prefix.values():
            self._changed.update(mirror.items)

    def _revision_of(self, key: str) -> int:
        for prefix, mirror in self._by_prefix.items():
            if key.startswith(prefix):
                return mirror.revision_of(key)
        raise ValueError(f"{key} is under no prefix that the loop reads")
