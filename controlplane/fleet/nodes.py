"""Writes what is known of machines into `actual/nodes`.

In come opened sessions, device samples and judgements of silence, out go guarded writes of the nodes'
records. Heartbeats stay in memory; the records are refreshed, many in one transaction, often enough that any
control plane can tell a node that is gone.
"""

from collections.abc import Callable, Collection, Iterable, Sequence

import structlog
from millrace.core.v1 import node_pb2, stats_pb2, types_pb2
from millrace.state.v1 import records_pb2

from controlplane.fleet.sessions import Session
from core.clock import Clock, to_timestamp
from core.errors import Conflict
from core.states import NodeState
from core.store import Compare, Mirror, Put, Store, keys

_log = structlog.get_logger(__name__)

WRITE_ATTEMPTS_MAX = 5
# Below etcd's bound of 128 operations a transaction.
REFRESHES_PER_COMMIT = 100


class NodeWriter:
    """The one writer of `actual/nodes`."""

    def __init__(
        self, store: Store, clock: Clock, records: Mirror[records_pb2.NodeObservationRecord]
    ) -> None:
        self._store = store
        self._clock = clock
        self._records = records
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

    async def refresh(self, sessions: Sequence[Session]) -> list[Session]:
        """Renews the heartbeat time of nodes' records; returns the sessions that do not own theirs any more.

        Raises:
            StoreUnavailable: The store did not answer.
            Conflict: A record changed more often than it was retried.
        """
        disowned: list[Session] = []
        for start in range(0, len(sessions), REFRESHES_PER_COMMIT):
            batch = sessions[start : start + REFRESHES_PER_COMMIT]
            if not await self._refresh_together(batch):
                # One record that has just changed refuses all: each is then written by itself.
                disowned += [each for each in batch if not await self._refresh_one(each)]
        return disowned

    async def _refresh_together(self, sessions: Sequence[Session]) -> bool:
        """Writes the records of several nodes as the mirror shows them; False where one is not as shown."""
        puts, compares = [], []
        for session in sessions:
            key = keys.actual_node(session.node)
            known = self._records.get(key)
            if known is None or known.session_id != session.session_id:
                return False
            record = records_pb2.NodeObservationRecord()
            record.CopyFrom(known)
            self._renew(record, session)
            puts.append(Put(key, record.SerializeToString()))
            compares.append(Compare(key, mod_revision=self._records.revision_of(key)))
        return (await self._store.commit(puts, compares=compares)).succeeded

    def forget_devices(self, alive: Collection[str]) -> None:
        """Drops the device samples of nodes that have no session here."""
        self._devices = {node: samples for node, samples in self._devices.items() if node in alive}

    def _renew(self, record: records_pb2.NodeObservationRecord, session: Session) -> None:
        self._enter(record, NodeState.READY)
        del record.devices[:]
        record.devices.extend(self._devices.get(session.node, ()))

    async def _refresh_one(self, session: Session) -> bool:
        """Renews one record; False when another session owns it now."""
        owned = True

        def change(record: records_pb2.NodeObservationRecord) -> bool:
            nonlocal owned
            owned = record.session_id == session.session_id
            if owned:
                self._renew(record, session)
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
