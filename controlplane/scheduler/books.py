"""The cluster as the scheduler knows it, kept from one plan to the next.

In come deployments, nodes, replicas and quotas one at a time, as they change; kept are the accounts that
planning needs (room, what namespaces hold, which replicas stand where) and the names of the deployments
that have to be looked at again. It decides nothing. `load` fills it from a whole snapshot, which gives the
same books as any order of single changes that leads there.
"""

from collections.abc import Iterable, Mapping

from controlplane.scheduler.profiles import Profiles
from controlplane.scheduler.room import Room
from controlplane.scheduler.structs import (
    Claim,
    DeploymentView,
    NodeView,
    Quota,
    ReplicaView,
    Reservation,
    Snapshot,
)
from controlplane.scheduler.usage import Usage

_NONE: Mapping[str, ReplicaView] = {}


class Books:
    """The cluster, with its accounts.

    Attributes:
        deployments: By `namespace/name`.
        nodes: By name.
        room: What is left on devices: all replicas are booked, and of reservations what those who make
            room for them do not hold any more.
        profiles: Nodes that are alike.
        usage: What namespaces hold: all replicas and reservations are counted.
        dirty: Deployments to look at again, deleted ones with replicas among them.
        epoch: Grows with every change that may let something fit, or no longer: of nodes, of what
            replicas hold, of priorities, reservations and quotas.
    """

    def __init__(self) -> None:
        self.deployments: dict[str, DeploymentView] = {}
        self.nodes: dict[str, NodeView] = {}
        self.room = Room()
        self.profiles = Profiles(self.room)
        self.usage = Usage()
        self.dirty: set[str] = set()
        self.epoch = 0
        self._replicas: dict[str, ReplicaView] = {}
        self._members: dict[str, dict[str, ReplicaView]] = {}
        self._on_node: dict[str, dict[str, ReplicaView]] = {}
        self._priorities: dict[int, int] = {}
        self._caching: dict[str, set[str]] = {}
        self._reserved: dict[str, list[tuple[str, Reservation]]] = {}
        self._beside: dict[str, list[Claim]] = {}
        self._left: set[str] = set()

    def load(self, snapshot: Snapshot) -> None:
        """Makes the books those of a snapshot."""
        for name in self.nodes.keys() - snapshot.nodes.keys():
            self.set_node(name, None)
        for name, node in snapshot.nodes.items():
            self.set_node(name, node)
        for namespace in self.usage.quotas.keys() - snapshot.quotas.keys():
            self.set_quota(namespace, None)
        for namespace, quota in snapshot.quotas.items():
            self.set_quota(namespace, quota)
        for key in self.deployments.keys() - snapshot.deployments.keys():
            self.set_deployment(key, None)
        for key, deployment in snapshot.deployments.items():
            self.set_deployment(key, deployment)
        for replica in self._replicas.keys() - snapshot.replicas.keys():
            self.set_replica(replica, None)
        for replica, view in snapshot.replicas.items():
            self.set_replica(replica, view)

    def members(self, key: str) -> Mapping[str, ReplicaView]:
        """Replicas under a deployment's name."""
        return self._members.get(key, _NONE)

    def on_node(self, node: str) -> Mapping[str, ReplicaView]:
        """Replicas on a node."""
        return self._on_node.get(node, _NONE)

    def holding(self) -> set[str]:
        """Nodes that hold replicas."""
        return set(self._on_node)

    def caching(self, model: str) -> Iterable[str]:
        """Nodes that hold a model's weights."""
        return self._caching.get(model, ()) if model else ()

    def has_priority_below(self, priority: int) -> bool:
        """True when some deployment is less important."""
        return any(each < priority for each in self._priorities)

    def set_deployment(self, key: str, view: DeploymentView | None) -> None:
        """Takes a deployment's present state; None when it is gone."""
        old = self.deployments.get(key)
        if view == old:
            return
        self.dirty.add(key)
        if _weight(old) != _weight(view):
            self.epoch += 1
        if old is not None:
            self._count_priority(old.priority, -1)
            for each in old.reservations:
                self.unreserve(key, each)
            del self.deployments[key]
        if view is not None:
            self._count_priority(view.priority, 1)
            for each in view.reservations:
                self.reserve(key, each)
            self.deployments[key] = view

    def set_node(self, name: str, view: NodeView | None) -> None:
        """Takes a node's present state; None when no record speaks of it any more."""
        old = self.nodes.get(name)
        if view == old:
            return
        self.epoch += 1
        self.dirty.update(each.deployment for each in self.on_node(name).values())
        for model in old.cached_models if old is not None else ():
            self._caching[model].discard(name)
            if not self._caching[model]:
                del self._caching[model]
        if view is None:
            del self.nodes[name]
            self.room.drop_node(name)
            self.profiles.drop_node(name)
            return
        for model in view.cached_models:
            self._caching.setdefault(model, set()).add(name)
        self.nodes[name] = view
        self.room.set_node(view)
        self.profiles.set_node(view)

    def set_replica(self, replica: str, view: ReplicaView | None) -> None:
        """Takes a replica's present state; None when it is forgotten."""
        old = self._replicas.get(replica)
        if view == old:
            return
        if _holds(old) != _holds(view):
            self.epoch += 1
        if old is not None:
            self.dirty.add(old.deployment)
            self.free(old.deployment, old.node, old.claims)
            _discard(self._members, old.deployment, replica)
            _discard(self._on_node, old.node, replica)
            del self._replicas[replica]
        if view is not None:
            self.dirty.add(view.deployment)
            self.book(view.deployment, view.node, view.claims)
            self._members.setdefault(view.deployment, {})[replica] = view
            self._on_node.setdefault(view.node, {})[replica] = view
            self._replicas[replica] = view
        for each in (old, view):
            if each is not None and each.node in self._reserved:
                self._book_beside(each.node)

    def set_quota(self, namespace: str, quota: Quota | None) -> None:
        """Takes a namespace's quota; None when there is none."""
        if self.usage.quotas.get(namespace) == quota:
            return
        self.epoch += 1
        if quota is None:
            del self.usage.quotas[namespace]
        else:
            self.usage.quotas[namespace] = quota

    def book(self, deployment: str, node: str, claims: tuple[Claim, ...]) -> None:
        """Takes room on a node for a deployment."""
        self.room.claim(node, claims)
        self.usage.take(deployment.partition("/")[0], node, claims)

    def free(self, deployment: str, node: str, claims: tuple[Claim, ...]) -> None:
        """Gives a deployment's room on a node back."""
        self.room.release(node, claims)
        self.usage.give(deployment.partition("/")[0], node, claims)

    def leave(self, replica: ReplicaView) -> None:
        """Frees what a replica holds, as if it had ended; what was reserved in its place is taken."""
        self._left.add(replica.replica)
        self.free(replica.deployment, replica.node, replica.claims)
        self._book_beside(replica.node)

    def stay(self, replica: ReplicaView) -> None:
        """Takes back that a replica leaves."""
        self._left.discard(replica.replica)
        self.book(replica.deployment, replica.node, replica.claims)
        self._book_beside(replica.node)

    def reserve(self, deployment: str, reservation: Reservation) -> None:
        """Keeps room for a deployment."""
        node = reservation.node
        self.usage.take(deployment.partition("/")[0], node, reservation.claims)
        self._reserved.setdefault(node, []).append((deployment, reservation))
        self._book_beside(node)

    def unreserve(self, deployment: str, reservation: Reservation) -> None:
        """Keeps room no longer."""
        node = reservation.node
        self.usage.give(deployment.partition("/")[0], node, reservation.claims)
        self._reserved[node].remove((deployment, reservation))
        self._book_beside(node)
        if not self._reserved[node]:
            del self._reserved[node]

    def _book_beside(self, node: str) -> None:
        """Books of a node's reservations what comes on top of what those who make room still hold.

        Room that is reserved and still held would otherwise count twice: more would be pre-empted than is
        needed, and room that has become free would be refused to whom it was kept for.
        """
        beside: list[Claim] = []
        for _, reservation in self._reserved.get(node, ()):
            held: dict[str, int] = {}
            for name in reservation.victims:
                victim = self._replicas.get(name)
                if victim is not None and victim.node == node and name not in self._left:
                    for each in victim.claims:
                        held[each.device_id] = held.get(each.device_id, 0) + each.memory_bytes
            for each in reservation.claims:
                more = each.memory_bytes - held.get(each.device_id, 0)
                if more > 0:
                    beside.append(Claim(each.device_id, more))
        before = self._beside.pop(node, [])
        if beside:
            self._beside[node] = beside
        if before != beside:
            self.room.claim(node, beside)
            self.room.release(node, before)

    def _count_priority(self, priority: int, change: int) -> None:
        count = self._priorities.get(priority, 0) + change
        if count:
            self._priorities[priority] = count
        else:
            del self._priorities[priority]


def _weight(view: DeploymentView | None) -> object:
    """What others feel of a deployment."""
    return None if view is None else (view.uid, view.priority, view.reservations)


def _holds(view: ReplicaView | None) -> object:
    """What others feel of a replica."""
    if view is None:
        return None
    stays = (view.draining, view.state.terminal, view.preempted_by)
    return view.deployment, view.uid, view.node, view.claims, view.created, stays


def _discard(grouped: dict[str, dict[str, ReplicaView]], group: str, replica: str) -> None:
    members = grouped[group]
    del members[replica]
    if not members:
        del grouped[group]
