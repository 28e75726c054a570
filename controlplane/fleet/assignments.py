"""The plan by machine: which replicas each node is assigned, kept up to date as the plan changes.

In come the changed keys of the mirror of `plan/replicas`, out come a node's assignments and the nodes that a
change concerns. With a thousand agents nobody can afford to look through all assignments for those of one
node. It does no I/O.
"""

from collections.abc import Iterable, Mapping
from types import MappingProxyType

from millrace.core.v1 import replica_pb2

from core.store import Mirror

Assigned = Mapping[str, tuple[replica_pb2.ReplicaAssignment, int]]
"""Key of a plan to its assignment and the revision of its last write."""

_NOTHING: Assigned = MappingProxyType({})


class AssignmentIndex:
    """Assignments by node; `update` must be told of every change of the mirror."""

    def __init__(self, plans: Mirror[replica_pb2.ReplicaAssignment]) -> None:
        self._plans = plans
        self._by_node: dict[str, dict[str, tuple[replica_pb2.ReplicaAssignment, int]]] = {}
        self._node_of: dict[str, str] = {}

    def of_node(self, node: str) -> Assigned:
        """Returns a copy of what a node is assigned."""
        found = self._by_node.get(node)
        return dict(found) if found else _NOTHING

    def update(self, changed: Iterable[str]) -> set[str]:
        """Takes over changed keys; returns the nodes that gained, lost or had changed an assignment."""
        concerned: set[str] = set()
        for key in changed:
            before = self._node_of.pop(key, None)
            if before is not None:
                concerned.add(before)
                self._remove(before, key)
            assignment = self._plans.get(key)
            if assignment is not None:
                concerned.add(assignment.node)
                self._node_of[key] = assignment.node
                self._by_node.setdefault(assignment.node, {})[key] = (
                    assignment,
                    self._plans.revision_of(key),
                )
        return concerned

    def _remove(self, node: str, key: str) -> None:
        held = self._by_node[node]
        del held[key]
        if not held:
            # Nodes come and go; an empty entry for each that ever was would stay for ever.
            del self._by_node[node]
