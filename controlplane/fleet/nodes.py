"""Writes what is known of machines into `actual/nodes`.

In come opened sessions, device samples and judgements of silence, out go guarded writes of the node's
record. Heartbeats stay in memory; the record is refreshed often enough that any control plane can tell a
node that is gone.
"""

from collections.abc import Callable, Iterable

import structlog
from millrace.core.v1 import node_pb2, stats_pb2, types_pb2
from millrace.state.v1 import records_pb2

from controlplane.fleet.sessions import Session
from core.clock import Clock, to_timestamp
from core.errors import Conflict
from core.states import NodeState
from core.store import Compare, Put, Store, keys

_log = structlog.get_logger(__name__)

WRITE_ATTEMPTS_MAX = 5


class NodeWriter:
    """The one writer of `actual/nodes`."""

    def __init__(self, store: Store, clock: Clock) -> None:
        self._store = store
        self._clock = clock
        self._devices: dict[str, tuple[stats_pb2.DeviceStats, ...]] = {}

    async def opened(self, session: Session, inventory: node_pb2.NodeInventory) -> None:
        """Stores a new session with its inventory; the node is READY.

        Raises:
            StoreUnavailable: The store did not answer.
            Conflict: The record changed more often than it was retried.
        """

        def change(record: records_pb2.NodeObservationRecord) -> bool:
            record.inventory.CopyFrom(inventory)
            record.session_id = session.session_id
            self._enter(record, NodeState.READY)
            return True

        session.opened_revision = await self._change(session.node, change)

    def note_devices(self, node: str, devices: Iterable[stats_pb2.DeviceStats]) -> None:
        """Keeps device samples for the next refresh of the record."""
        self._devices[node] = tuple(devices)

    async def refresh(self, session: Session) -> bool:
        """Renews the heartbeat time of a node's record; False when another session owns it now.

        Raises:
            StoreUnavailable: The store did not answer.
        """
        owned = True

        def change(record: records_pb2.NodeObservationRecord) -> bool:
            nonlocal owned
            owned = record.session_id == session.session_id
            if owned:
                self._enter(record, NodeState.READY)
                del record.devices[:]
                record.devices.extend(self._devices.get(session.node, ()))
            return owned

        await self._change(session.node, change)
        return owned

    async def judged(self, node: str, state: NodeState, *, revision: int) -> bool:
        """Stores a judgement if the record is still the judged one; True when it was written.

        Raises:
            StoreUnavailable: The store did not answer.
        """
        key = keys.actual_node(node)
        current = await self._store.get(key)
        if current is None or current.mod_revision != revision:
            return False
        record = records_pb2.NodeObservationRecord.FromString(current.value)
        record.state = types_pb2.NodeState.ValueType(state)
        record.transition_time.CopyFrom(to_timestamp(self._clock.now()))
        commit = await self._store.commit(
            [Put(key, record.SerializeToString())], compares=[Compare(key, mod_revision=revision)]
        )
        return commit.succeeded

    def _enter(self, record: records_pb2.NodeObservationRecord, state: NodeState) -> None:
        stamp = to_timestamp(self._clock.now())
        value = types_pb2.NodeState.ValueType(state)
        if record.state != value:
            record.state = value
            record.transition_time.CopyFrom(stamp)
        record.heartbeat_time.CopyFrom(stamp)

    async def _change(self, node: str, change: Callable[[records_pb2.NodeObservationRecord], bool]) -> int:
        """Changes a record under guard; returns the revision of the write, 0 where nothing was to change."""
        key = keys.actual_node(node)
        for _ in range(WRITE_ATTEMPTS_MAX):
            current = await self._store.get(key)
            record = records_pb2.NodeObservationRecord()
            if current is not None:
                record.ParseFromString(current.value)
            if not change(record):
                return 0
            commit = await self._store.commit(
                [Put(key, record.SerializeToString())],
                compares=[Compare(key, mod_revision=current.mod_revision if current else 0)],
            )
            if commit.succeeded:
                return commit.revision
        raise Conflict(
            f"node {node} changed {WRITE_ATTEMPTS_MAX} times while it was written",
            metadata={"node": node},
        )
