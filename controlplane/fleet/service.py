"""Composition of fleet: mirrors, servicer and the two loops that refresh and judge nodes.

In comes the store, out come agents that know their assignments and records that tell how the fleet is.
Losing the store stops judging: silence that comes from our own blindness condemns nobody.
"""

import asyncio
from typing import Any

import grpc
import structlog
from millrace.core.v1 import replica_pb2
from millrace.fleet.v1 import fleet_service_pb2, fleet_service_pb2_grpc
from millrace.state.v1 import records_pb2

from controlplane.events import EventSink
from controlplane.fleet.assignments import AssignmentIndex
from controlplane.fleet.calibrations import CalibrationWriter
from controlplane.fleet.liveness import SILENT_HEARTBEATS, STORE_AGE_SECONDS_MAX, Witness, judge
from controlplane.fleet.nodes import NodeWriter
from controlplane.fleet.observations import ObservationWriter
from controlplane.fleet.servicer import FleetServicer
from controlplane.fleet.sessions import Session, SessionTable
from controlplane.fleet.stats import StatsWriter
from core.clock import Clock
from core.errors import Conflict
from core.states import NodeState
from core.store import Mirror, Store, StoreError, StoreUnavailable, keys

_log = structlog.get_logger(__name__)

SERVICE_NAME = fleet_service_pb2.DESCRIPTOR.services_by_name["FleetService"].full_name
# A node's record is refreshed this many times within the lost-after period.
REFRESHES_PER_PERIOD = 4
# How often a wait for the store says that it still waits.
SYNC_REPORT_SECONDS = 10.0


async def _first_listing(mirror: Mirror[Any]) -> None:
    """Waits for a mirror's first listing, however long the store takes to come up."""
    while not mirror.synced:
        try:
            await mirror.wait_synced(SYNC_REPORT_SECONDS)
        except StoreUnavailable as error:
            _log.warning("fleet waits for the store", error=str(error))


class FleetService:
    """Everything that has to do with agents."""

    def __init__(
        self,
        store: Store,
        clock: Clock,
        events: EventSink,
        *,
        heartbeat_seconds: float = 2.0,
        stats_seconds: float = 1.0,
        lost_after_seconds: float = 40.0,
    ) -> None:
        """Builds the parts; nothing runs before `run`.

        Args:
            store: Where records are kept.
            clock: Time.
            events: Where events go.
            heartbeat_seconds: Period that agents are told.
            stats_seconds: Period of samples that agents are told.
            lost_after_seconds: Silence after which a node is lost.
        """
        self._clock = clock
        self._events = events
        self._heartbeat_seconds = heartbeat_seconds
        self._lost_after_seconds = lost_after_seconds
        self._plans = Mirror(
            store,
            keys.PLAN_REPLICAS,
            replica_pb2.ReplicaAssignment.FromString,
            name="fleet-plans",
            clock=clock,
        )
        self._actual = Mirror(
            store,
            keys.ACTUAL_REPLICAS,
            replica_pb2.ReplicaObservation.FromString,
            name="fleet-replicas",
            clock=clock,
        )
        self._node_records = Mirror(
            store,
            keys.ACTUAL_NODES,
            records_pb2.NodeObservationRecord.FromString,
            name="fleet-nodes",
            clock=clock,
        )
        self._assignments = AssignmentIndex(self._plans)
        self._plans.subscribe(self._plans_changed)
        self._sessions = SessionTable(clock)
        self._observations = ObservationWriter(store, self._plans, self._actual, self._assignments)
        self._nodes = NodeWriter(store, clock, self._node_records)
        self._stats = StatsWriter(store, clock)
        self._witnesses: dict[str, Witness] = {}
        self._trusted_since: float | None = None
        self._removed = asyncio.Event()
        self._servicer = FleetServicer(
            sessions=self._sessions,
            plans=self._plans,
            assignments=self._assignments,
            observations=self._observations,
            calibrations=CalibrationWriter(store, clock, plans=self._plans, nodes=self._node_records),
            nodes=self._nodes,
            stats=self._stats,
            events=events,
            clock=clock,
            heartbeat_seconds=heartbeat_seconds,
            stats_seconds=stats_seconds,
            lost_after_seconds=lost_after_seconds,
        )

    def register(self, server: grpc.aio.Server) -> None:
        """Adds the servicer to a server."""
        fleet_service_pb2_grpc.add_FleetServiceServicer_to_server(self._servicer, server)

    async def run(self) -> None:
        """Runs until cancelled."""
        async with asyncio.TaskGroup() as group:
            for mirror in (self._plans, self._actual, self._node_records):
                group.create_task(mirror.run(), name=f"mirror-{mirror.name}")
            group.create_task(self._forget_loop(), name="fleet-forget")
            group.create_task(self._judge_loop(), name="fleet-judge")
            group.create_task(self._refresh_loop(), name="fleet-refresh")
            group.create_task(self._stats.run(), name="fleet-stats")

    def _plans_changed(self, changed: frozenset[str]) -> None:
        if any(self._plans.get(key) is None for key in changed):
            self._removed.set()
        for node in self._assignments.update(changed):
            session = self._sessions.of_node(node)
            if session is not None:
                session.assignments_changed.set()

    async def _forget_loop(self) -> None:
        """Deletes observations whose assignment is gone, at once and in a slow sweep."""
        await _first_listing(self._plans)
        await _first_listing(self._actual)
        while True:
            try:
                await self._observations.forget(self._observations.orphaned())
            except StoreError as error:
                _log.warning("observations not forgotten yet", error=str(error))
            try:
                async with asyncio.timeout(self._heartbeat_seconds):
                    await self._removed.wait()
            except TimeoutError:
                continue
            self._removed.clear()

    async def _refresh_loop(self) -> None:
        period = self._lost_after_seconds / REFRESHES_PER_PERIOD
        while True:
            await self._clock.sleep(period)
            alive_after = self._clock.monotonic() - self._heartbeat_seconds * SILENT_HEARTBEATS
            sessions = self._sessions.all()
            self._nodes.forget_devices({each.node for each in sessions})
            alive = [each for each in sessions if each.opened_revision and each.heard_at >= alive_after]
            try:
                for session in await self._nodes.refresh(alive):
                    self._sessions.close(session)
            except (StoreError, Conflict) as error:
                _log.warning("node records not refreshed", nodes=len(alive), error=str(error))

    async def _judge_loop(self) -> None:
        await _first_listing(self._node_records)
        while True:
            await self._clock.sleep(self._heartbeat_seconds / 2)
            if self._node_records.age_seconds() > STORE_AGE_SECONDS_MAX:
                self._trusted_since = None
                continue
            if self._trusted_since is None:
                self._trusted_since = self._clock.monotonic()
            records = self._node_records.items
            self._witnesses = {
                node: witness
                for node, witness in self._witnesses.items()
                if keys.actual_node(node) in records
            }
            for key, record in records.items():
                try:
                    await self._judge_one(key.removeprefix(keys.ACTUAL_NODES), record)
                except StoreError as error:
                    _log.warning("judgement not stored", key=key, error=str(error))

    def _session_of(self, node: str, record: records_pb2.NodeObservationRecord) -> Session | None:
        """Returns the node's session here; ends one that the node has left for another control plane."""
        session = self._sessions.of_node(node)
        if session is None or not session.opened_revision:
            return session
        seen = self._node_records.revision_of(keys.actual_node(node))
        if seen >= session.opened_revision and record.session_id != session.session_id:
            _log.info("session ended, the node has opened one elsewhere", node=node)
            self._sessions.close(session)
            return None
        return session

    async def _judge_one(self, node: str, record: records_pb2.NodeObservationRecord) -> None:
        assert self._trusted_since is not None
        now = self._clock.monotonic()
        stamp = record.heartbeat_time.ToNanoseconds()
        witness = self._witnesses.get(node)
        if witness is None or witness.heartbeat_stamp != stamp:
            witness = self._witnesses[node] = Witness(stamp, now)
        session = self._session_of(node, record)
        state = NodeState(record.state)
        deserved = judge(
            state=state,
            heard_at=session.heard_at if session is not None else None,
            witness=witness,
            trusted_since=self._trusted_since,
            now=now,
            silent_after_seconds=self._heartbeat_seconds * SILENT_HEARTBEATS,
            lost_after_seconds=self._lost_after_seconds,
        )
        if deserved is state:
            return
        revision = self._node_records.revision_of(keys.actual_node(node))
        if not await self._nodes.judged(node, deserved, revision=revision):
            return
        _log.warning("node state changed", node=node, state=deserved.name, before=state.name)
        self._events.emit(
            namespace="millrace-system",
            node=node,
            reason={
                NodeState.READY: "NodeReady",
                NodeState.SILENT: "NodeSilent",
                NodeState.LOST: "NodeLost",
                NodeState.UNSPECIFIED: "NodeUnknown",
            }[deserved],
            message={
                NodeState.READY: "the agent is heard again",
                NodeState.SILENT: "heartbeats have stopped; replicas are left alone for "
                f"{self._lost_after_seconds:g} s",
                NodeState.LOST: f"no word for {self._lost_after_seconds:g} s; its replicas may be replaced",
                NodeState.UNSPECIFIED: "",
            }[deserved],
            source="fleet",
            warning=deserved is not NodeState.READY,
        )
