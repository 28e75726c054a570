"""What must hold in the end, and what must hold always. Reads one snapshot of etcd and the process table.

In comes a cluster, out come sentences, one for each thing that does not hold; none means that it has
converged. Nothing here changes anything.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from millrace.core.v1 import endpoint_pb2, replica_pb2, types_pb2
from millrace.state.v1 import records_pb2

from controlplane.status import deployment_status
from core.store import KeyValue, keys
from tests.chaos.cluster import ChaosCluster

SPEC = keys.ROOT + "spec/"


@dataclass(frozen=True)
class World:
    """One snapshot of etcd."""

    items: Mapping[str, KeyValue]

    def below(self, prefix: str) -> dict[str, bytes]:
        return {key: item.value for key, item in self.items.items() if key.startswith(prefix)}

    @property
    def assignments(self) -> dict[str, replica_pb2.ReplicaAssignment]:
        found = self.below(keys.PLAN_REPLICAS).values()
        return {each.replica: each for each in map(replica_pb2.ReplicaAssignment.FromString, found)}

    @property
    def observations(self) -> dict[str, replica_pb2.ReplicaObservation]:
        found = self.below(keys.ACTUAL_REPLICAS).values()
        return {each.replica: each for each in map(replica_pb2.ReplicaObservation.FromString, found)}

    @property
    def endpoints(self) -> dict[str, endpoint_pb2.Endpoint]:
        found = self.below(keys.SERVE_ENDPOINTS).values()
        return {each.replica: each for each in map(endpoint_pb2.Endpoint.FromString, found)}

    @property
    def deployments(self) -> list[records_pb2.DeploymentRecord]:
        found = self.below(keys.SPEC_DEPLOYMENTS).values()
        return [records_pb2.DeploymentRecord.FromString(each) for each in found]


async def look(cluster: ChaosCluster) -> World:
    """Reads everything that etcd holds of Millrace, as of one revision."""
    page = await cluster.store.list(keys.ROOT)
    return World({item.key: item for item in page.items})


def overplaced(world: World) -> list[str]:
    """Devices that the plan gives away more than once over; must be empty at every moment."""
    claimed: Counter[tuple[str, str]] = Counter()
    for assignment in world.assignments.values():
        for claim in assignment.devices:
            claimed[assignment.node, claim.device_id] += claim.memory_bytes
    room: dict[tuple[str, str], int] = {}
    for value in world.below(keys.ACTUAL_NODES).values():
        inventory = records_pb2.NodeObservationRecord.FromString(value).inventory
        room |= {(inventory.node, device.id): device.memory_bytes for device in inventory.devices}
    return [
        f"device {device} of {node} is claimed with {taken} of {room.get((node, device), 0)} bytes"
        for (node, device), taken in claimed.items()
        if taken > room.get((node, device), 0)
    ]


def _processes(cluster: ChaosCluster, world: World) -> list[str]:
    planned = {(each.node, each.replica) for each in world.assignments.values()}
    running = {(node.name, replica) for node in cluster.nodes for replica in node.engines()}
    return [f"orphan: an engine of {replica} runs on {node}" for node, replica in running - planned] + [
        f"lost: no engine of {replica} runs on {node}" for node, replica in planned - running
    ]


def _serving(world: World) -> list[str]:
    """Compares what routers may use with what serves."""
    ready = {
        replica: each.url
        for replica, each in world.observations.items()
        if each.state == types_pb2.REPLICA_STATE_READY and each.healthy and replica in world.assignments
    }
    served = {
        replica: each.url
        for replica, each in world.endpoints.items()
        if each.state == types_pb2.ENDPOINT_STATE_READY
    }
    found = (
        [] if ready == served else [f"endpoints {sorted(served)} are not the ready replicas {sorted(ready)}"]
    )
    unfinished = set(world.endpoints) - set(served)
    return found + [f"endpoint {replica} is neither gone nor ready" for replica in sorted(unfinished)]


def _settled(world: World) -> list[str]:
    found = []
    for record in world.deployments:
        name = f"{record.namespace}/{record.name}"
        value = world.items.get(keys.plan_deployment(record.namespace, record.name))
        concluded = records_pb2.DeploymentPlanRecord.FromString(value.value) if value else None
        status = deployment_status(
            record,
            concluded,
            [each for each in world.assignments.values() if each.deployment == record.name],
            [each for each in world.observations.values() if each.deployment == record.name],
        )
        if status.reconciling or status.ready_replicas != status.desired_replicas:
            found.append(f"{name}: {status.ready_replicas} of {status.desired_replicas} replicas serve")
    return found


async def unmet(cluster: ChaosCluster, spec: Mapping[str, bytes]) -> list[str]:
    """Returns what does not hold; `spec` is what users had declared before."""
    world = await look(cluster)
    nodes = [
        f"node {key.removeprefix(keys.ACTUAL_NODES)} is not ready"
        for key, value in world.below(keys.ACTUAL_NODES).items()
        if records_pb2.NodeObservationRecord.FromString(value).state != types_pb2.NODE_STATE_READY
    ]
    leftovers = set(world.observations) - set(world.assignments)
    leading = [each.name for each in cluster.controlplanes if await cluster.decides(each)]
    return [
        *([] if world.below(SPEC) == spec else ["what users declared was changed"]),
        *([] if keys.LIVE_LEADER in world.items and len(leading) == 1 else [f"not one leads: {leading}"]),
        *[f"{name} does not serve" for name in await cluster.silent()],
        *([] if world.below(keys.LIVE_ROUTERS) else ["no router says that it lives"]),
        *overplaced(world),
        *nodes,
        *[f"a record of {replica} outlived its assignment" for replica in sorted(leftovers)],
        *_settled(world),
        *_serving(world),
        *_processes(cluster, world),
    ]
