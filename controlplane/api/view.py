"""What the API knows: mirrors of spec, plan and actual state, and the resources made of them.

In come the mirrors' batches, out come `Deployment` and `Node` messages with status, and word of which
deployments changed. Reads never wait for the store; before the first listing they are refused. Nothing
is written here.
"""

import asyncio
from collections import defaultdict
from collections.abc import Callable, Iterable

from millrace.core.v1 import deployment_pb2, node_pb2, policy_pb2, replica_pb2
from millrace.state.v1 import records_pb2

from controlplane.api import limits
from controlplane.status import deployment_status
from core.clock import Clock
from core.errors import InvalidArgument, NotFound
from core.store import keys
from core.store.mirror import Mirror
from core.store.types import Store, StoreUnavailable

DeploymentId = tuple[str, str]
"""Namespace and name."""


def deployment_not_found(namespace: str, name: str) -> NotFound:
    """Builds the error for a deployment that is not there."""
    return NotFound(
        f"there is no deployment `{name}` in namespace `{namespace}`",
        metadata={"namespace": namespace, "deployment": name},
    )


def require_identity(namespace: str, name: str) -> None:
    """Refuses half a name, which no lookup can mean.

    Raises:
        InvalidArgument: A part is empty.
    """
    if not namespace:
        raise InvalidArgument.of("namespace", "is empty; give the namespace that the deployment is in")
    if not name:
        raise InvalidArgument.of("name", "is empty; give the deployment's name")


def node_not_found(node: str) -> NotFound:
    """Builds the error for a node that never reported."""
    return NotFound(
        f"there is no node `{node}`: no agent of that name has ever reported", metadata={"node": node}
    )


class ClusterView:
    """Mirrors of everything that the API answers from.

    Attributes:
        deployments: What users want.
        nodes: What operators want of nodes.
        plans: What the scheduler concluded.
        assignments: What the scheduler ordered.
        observations: What agents reported of replicas.
        machines: What fleet knows of nodes.
        calibrations: What engines were measured to need.
        namespaces: What operators want of tenants.
    """

    def __init__(self, store: Store, clock: Clock) -> None:
        self.deployments = Mirror(
            store,
            keys.SPEC_DEPLOYMENTS,
            records_pb2.DeploymentRecord.FromString,
            name="api-deployments",
            clock=clock,
        )
        self.nodes = Mirror(
            store, keys.SPEC_NODES, records_pb2.NodeRecord.FromString, name="api-node-specs", clock=clock
        )
        self.plans = Mirror(
            store,
            keys.PLAN_DEPLOYMENTS,
            records_pb2.DeploymentPlanRecord.FromString,
            name="api-plans",
            clock=clock,
        )
        self.assignments = Mirror(
            store,
            keys.PLAN_REPLICAS,
            replica_pb2.ReplicaAssignment.FromString,
            name="api-assignments",
            clock=clock,
        )
        self.observations = Mirror(
            store,
            keys.ACTUAL_REPLICAS,
            replica_pb2.ReplicaObservation.FromString,
            name="api-observations",
            clock=clock,
        )
        self.machines = Mirror(
            store,
            keys.ACTUAL_NODES,
            records_pb2.NodeObservationRecord.FromString,
            name="api-machines",
            clock=clock,
        )
        self.calibrations = Mirror(
            store,
            keys.ACTUAL_CALIBRATIONS,
            records_pb2.CalibrationRecord.FromString,
            name="api-calibrations",
            clock=clock,
        )
        self.namespaces = Mirror(
            store,
            keys.SPEC_NAMESPACES,
            records_pb2.NamespaceRecord.FromString,
            name="api-namespaces",
            clock=clock,
        )
        self._assigned: defaultdict[DeploymentId, set[str]] = defaultdict(set)
        self._observed: defaultdict[DeploymentId, set[str]] = defaultdict(set)
        self._callbacks: list[Callable[[frozenset[DeploymentId]], None]] = []
        self._subscribe_all()

    async def run(self) -> None:
        """Keeps the mirrors until cancelled."""
        async with asyncio.TaskGroup() as group:
            for mirror in self._mirrors:
                group.create_task(mirror.run(), name=f"mirror-{mirror.name}")

    async def wait_synced(self, timeout_seconds: float) -> None:
        """Waits for the first listing of everything.

        Raises:
            StoreUnavailable: It did not come in time.
        """
        for mirror in self._mirrors:
            await mirror.wait_synced(timeout_seconds)

    @property
    def synced(self) -> bool:
        """True once everything has been listed."""
        return all(mirror.synced for mirror in self._mirrors)

    def require_synced(self) -> None:
        """Refuses to answer from an empty view.

        Raises:
            StoreUnavailable: The store has not been read yet.
        """
        if not self.synced:
            raise StoreUnavailable("the control plane has not read the store yet: is etcd up? Try again")

    def age_seconds(self) -> float:
        """Returns the time since the store's last word on the part that was heard least recently."""
        return max(mirror.age_seconds() for mirror in self._mirrors)

    @property
    def revision(self) -> int:
        """Revision up to which no change of a deployment is missing."""
        return min(mirror.revision for mirror in self._deployment_mirrors)

    def subscribe(self, callback: Callable[[frozenset[DeploymentId]], None]) -> Callable[[], None]:
        """Has a function called with the deployments whose spec, plan or observation changed.

        Returns:
            A function that ends the subscription.
        """
        self._callbacks.append(callback)
        return lambda: self._callbacks.remove(callback)

    def record(self, namespace: str, name: str) -> records_pb2.DeploymentRecord:
        """Returns a deployment's record.

        Raises:
            InvalidArgument: A part of the name is empty.
            NotFound: There is none.
            StoreUnavailable: The store has not been read yet.
        """
        require_identity(namespace, name)
        self.require_synced()
        record = self.deployments.get(keys.spec_deployment(namespace, name))
        if record is None:
            raise deployment_not_found(namespace, name)
        return record

    def assignments_of(self, deployment: DeploymentId) -> list[replica_pb2.ReplicaAssignment]:
        """Returns what is ordered for a deployment."""
        found = (self.assignments.get(key) for key in self._assigned.get(deployment, ()))
        return [each for each in found if each is not None]

    def observations_of(self, deployment: DeploymentId) -> list[replica_pb2.ReplicaObservation]:
        """Returns what is reported of a deployment."""
        found = (self.observations.get(key) for key in self._observed.get(deployment, ()))
        return [each for each in found if each is not None]

    def deployment(
        self, record: records_pb2.DeploymentRecord, mod_revision: int
    ) -> deployment_pb2.Deployment:
        """Makes the resource of a record: spec as given, status as known now."""
        resource = deployment_pb2.Deployment(
            namespace=record.namespace,
            name=record.name,
            uid=record.uid,
            generation=record.generation,
            etag=str(mod_revision) if mod_revision else "",
            create_time=record.create_time,
            update_time=record.update_time,
            metadata=record.metadata,
            spec=record.spec,
        )
        identity = (record.namespace, record.name)
        resource.status.CopyFrom(
            deployment_status(
                record,
                self.plans.get(keys.plan_deployment(*identity)),
                self.assignments_of(identity),
                self.observations_of(identity),
            )
        )
        return resource

    def find_deployment(self, identity: DeploymentId) -> deployment_pb2.Deployment | None:
        """Makes the resource of a deployment as the mirrors know it; None where there is none."""
        key = keys.spec_deployment(*identity)
        record = self.deployments.get(key)
        return None if record is None else self.deployment(record, self.deployments.revision_of(key))

    def node(self, machine: records_pb2.NodeObservationRecord) -> node_pb2.Node:
        """Makes the resource of a machine."""
        name = machine.inventory.node
        key = keys.spec_node(name)
        wanted = self.nodes.get(key)
        return node_pb2.Node(
            name=name,
            etag=str(self.nodes.revision_of(key)),
            spec=wanted.spec if wanted is not None else None,
            status=node_pb2.NodeStatus(
                state=machine.state,
                transition_time=machine.transition_time,
                heartbeat_time=machine.heartbeat_time,
                inventory=machine.inventory,
                replicas=sorted(
                    each.replica for each in self.assignments.items.values() if each.node == name
                ),
            ),
        )

    def quota(self, namespace: str) -> policy_pb2.Quota:
        """What a namespace may hold; nothing is set where it is unbounded."""
        record = self.namespaces.get(keys.spec_namespace(namespace))
        return record.spec.quota if record is not None else policy_pb2.Quota()

    async def wait_for_write(self, revision: int) -> None:
        """Waits until the own view shows a write, so that a caller reads what it wrote.

        A view that lags does not undo the write: the wait ends silently after its bound.
        """
        await _shown(self.deployments, revision)

    async def wait_for_node_write(self, revision: int) -> None:
        """As `wait_for_write`, for what operators want of nodes."""
        await _shown(self.nodes, revision)

    @property
    def _mirrors(self) -> "tuple[Mirror[object], ...]":
        return (*self._deployment_mirrors, self.nodes, self.machines, self.calibrations, self.namespaces)  # type: ignore[arg-type]  # read only here

    @property
    def _deployment_mirrors(self) -> "tuple[Mirror[object], ...]":
        return (self.deployments, self.plans, self.assignments, self.observations)  # type: ignore[return-value]  # as above

    def _subscribe_all(self) -> None:
        self.deployments.subscribe(
            lambda changed: self._announce(_identity(key, keys.SPEC_DEPLOYMENTS) for key in changed)
        )
        self.plans.subscribe(
            lambda changed: self._announce(_identity(key, keys.PLAN_DEPLOYMENTS) for key in changed)
        )
        self.assignments.subscribe(
            lambda changed: self._replicas_changed(
                changed, keys.PLAN_REPLICAS, self._assigned, self.assignments
            )
        )
        self.observations.subscribe(
            lambda changed: self._replicas_changed(
                changed, keys.ACTUAL_REPLICAS, self._observed, self.observations
            )
        )

    def _replicas_changed(
        self,
        changed: frozenset[str],
        prefix: str,
        index: defaultdict[DeploymentId, set[str]],
        mirror: Mirror[replica_pb2.ReplicaAssignment] | Mirror[replica_pb2.ReplicaObservation],
    ) -> None:
        touched: set[DeploymentId] = set()
        for key in changed:
            identity = _identity(key, prefix)
            touched.add(identity)
            if mirror.get(key) is not None:
                index[identity].add(key)
                continue
            index[identity].discard(key)
            if not index[identity]:
                del index[identity]
        self._announce(touched)

    def _announce(self, identities: Iterable[DeploymentId]) -> None:
        changed = frozenset(identities)
        for callback in tuple(self._callbacks):
            callback(changed)


async def _shown(
    mirror: Mirror[records_pb2.DeploymentRecord] | Mirror[records_pb2.NodeRecord], revision: int
) -> None:
    try:
        await mirror.wait_for_revision(revision, limits.MIRROR_WAIT_SECONDS)
    except StoreUnavailable:
        return


def _identity(key: str, prefix: str) -> DeploymentId:
    namespace, _, rest = key.removeprefix(prefix).partition("/")
    return namespace, rest.split("/", 1)[0]


def identity_of_key(key: str) -> DeploymentId:
    """Returns the deployment that a key of spec, plan or actual state belongs to."""
    for prefix in (
        keys.SPEC_DEPLOYMENTS, keys.PLAN_DEPLOYMENTS, keys.PLAN_REPLICAS, keys.ACTUAL_REPLICAS,
    ):  # fmt: skip
        if key.startswith(prefix):
            return _identity(key, prefix)
    raise ValueError(f"{key} belongs to no deployment")
