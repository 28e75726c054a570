"""Writes what agents report into `actual/replicas`: forward only, guarded, and cleaned up.

In come observations, out go transactions. A state never moves backward, and a record exists only while
its assignment does: what nobody assigned is named to the agent instead of being stored.
"""

from collections.abc import Collection, Iterable
from datetime import datetime

import structlog
from millrace.core.v1 import replica_pb2, types_pb2

from controlplane.fleet.assignments import AssignmentIndex
from core.clock import to_timestamp
from core.errors import Conflict
from core.store import Commit, Compare, Delete, Mirror, Put, Store, keys

_log = structlog.get_logger(__name__)

# Another writer of the same record can only be the clean-up or an earlier session of the node, so a few
# fresh reads settle every race.
WRITE_ATTEMPTS_MAX = 5


def key_of(observation: replica_pb2.ReplicaObservation) -> str:
    """Key of an observation's record."""
    return keys.actual_replica(observation.namespace, observation.deployment, observation.replica)


def plan_key_of(actual_key: str) -> str:
    """Key of the assignment that an observation's record belongs to."""
    return keys.PLAN_REPLICAS + actual_key.removeprefix(keys.ACTUAL_REPLICAS)


def actual_key_of(plan_key: str) -> str:
    """Key of what is reported of an assignment's replica."""
    return keys.ACTUAL_REPLICAS + plan_key.removeprefix(keys.PLAN_REPLICAS)


def supersedes(new: replica_pb2.ReplicaObservation, old: replica_pb2.ReplicaObservation | None) -> bool:
    """Tells whether a report is to be stored over what is known: same or later state, and different."""
    if old is None:
        return True
    if new.state < old.state:
        return False
    return new.SerializeToString(deterministic=True) != old.SerializeToString(deterministic=True)


class ObservationWriter:
    """The one writer of `actual/replicas`."""

    def __init__(
        self,
        store: Store,
        plans: Mirror[replica_pb2.ReplicaAssignment],
        actual: Mirror[replica_pb2.ReplicaObservation],
        assignments: AssignmentIndex,
    ) -> None:
        self._store = store
        self._plans = plans
        self._assignments = assignments
        self._actual = actual

    async def write(
        self, node: str, observations: Iterable[replica_pb2.ReplicaObservation]
    ) -> tuple[list[replica_pb2.ReplicaObservation], list[str]]:
        """Stores reports of a node.

        Returns:
            The reports that moved a replica to a new state, and the replicas that nobody assigned to
            that node.

        Raises:
            StoreUnavailable: The store did not answer; the agent reports again.
            Conflict: The record changed more often than it was retried.
        """
        moved: list[replica_pb2.ReplicaObservation] = []
        unknown: list[str] = []
        for observation in observations:
            assignment = self._plans.get(plan_key_of(key_of(observation)))
            if assignment is None or assignment.node != node:
                unknown.append(observation.replica)
                continue
            observation.node = node
            if await self._write_one(observation):
                moved.append(observation)
        return moved, unknown

    async def _write_one(self, observation: replica_pb2.ReplicaObservation) -> bool:
        """Stores one report; tells whether it moved the replica to a new state."""
        key = key_of(observation)
        old, revision = self._actual.get(key), self._actual.revision_of(key)
        for _ in range(WRITE_ATTEMPTS_MAX):
            if not supersedes(observation, old):
                return False
            commit = await self._store.commit(
                [Put(key, observation.SerializeToString(deterministic=True))],
                compares=[Compare(key, mod_revision=revision)],
            )
            if commit.succeeded:
                return old is None or old.state != observation.state
            current = await self._store.get(key)
            revision = current.mod_revision if current else 0
            old = replica_pb2.ReplicaObservation.FromString(current.value) if current else None
        raise Conflict(
            f"replica {observation.replica} changed {WRITE_ATTEMPTS_MAX} times while it was written",
            metadata={"replica": observation.replica},
        )

    async def fail_missing(
        self, node: str, reported: Collection[str], now: datetime
    ) -> list[replica_pb2.ReplicaObservation]:
        """Fails what ran on a node and is unknown to the agent that has just opened its session.

        An agent that lost its journal cannot adopt what it started, and its reports of a fresh start would
        move backward and be dropped: without this the replica would be stuck in its last state.

        Returns:
            The replicas that were failed.

        Raises:
            StoreUnavailable: The store did not answer.
            Conflict: A record changed more often than it was retried.
        """
        failed: list[replica_pb2.ReplicaObservation] = []
        # An observation lives no longer than its assignment, and all agents may come at once: only the
        # node's own are looked at.
        for key in self._assignments.of_node(node):
            known = self._actual.get(actual_key_of(key))
            if known is None or known.replica in reported:
                continue
            if not types_pb2.REPLICA_STATE_STARTING <= known.state < types_pb2.REPLICA_STATE_STOPPED:
                continue
            observation = replica_pb2.ReplicaObservation()
            observation.CopyFrom(known)
            observation.state = types_pb2.REPLICA_STATE_FAILED
            observation.state_time.CopyFrom(to_timestamp(now))
            observation.healthy = False
            observation.message = (
                "the agent no longer knows it (its journal is gone, or the machine was set up anew)"
            )
            if await self._write_one(observation):
                failed.append(observation)
        return failed

    async def forget(self, actual_keys: Iterable[str]) -> None:
        """Deletes the records whose assignment is gone.

        Raises:
            StoreUnavailable: The store did not answer; the next sweep tries again.
        """
        for key in actual_keys:
            plan_key = plan_key_of(key)
            if self._plans.get(plan_key) is not None or self._actual.get(key) is None:
                continue
            # The assignment must still be absent at the moment of the write: two mirrors may be
            # apart, and a record that has just come to life must survive.
            commit: Commit = await self._store.commit(
                [Delete(key)], compares=[Compare(plan_key, mod_revision=0)]
            )
            _log.debug("observation forgotten", key=key, succeeded=commit.succeeded)

    def orphaned(self) -> list[str]:
        """Returns the records without an assignment."""
        return [key for key in self._actual.items if self._plans.get(plan_key_of(key)) is None]


def describe_change(
    observation: replica_pb2.ReplicaObservation,
) -> tuple[str, str, bool] | None:
    """Returns reason, message and whether it is a warning for a report worth an event; else None."""
    place = f"on {observation.node}"
    match observation.state:
        case types_pb2.REPLICA_STATE_STARTING:
            process = f" (process {observation.pid})" if observation.pid else ""
            return "ReplicaStarting", f"engine started {place}{process}", False
        case types_pb2.REPLICA_STATE_READY:
            started = observation.start_time.ToMilliseconds()
            ready = observation.ready_time.ToMilliseconds()
            took = f" after {ready - started} ms" if started and ready else ""
            return "ReplicaReady", f"served its first token {place}{took} at {observation.url}", False
        case types_pb2.REPLICA_STATE_STOPPED:
            return "ReplicaStopped", f"{place}: {observation.message or 'stopped as asked'}", False
        case _:
            return None
