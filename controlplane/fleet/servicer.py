"""The gRPC face of fleet: what node agents call.

In come reports and heartbeats, out go sessions and assignments. It validates and delegates: the session
table knows who calls, the writers store what was said. It decides nothing about replicas.
"""

import asyncio
import re
from collections.abc import AsyncIterator
from typing import Any

import structlog
from google.protobuf.duration_pb2 import Duration
from millrace.core.v1 import replica_pb2
from millrace.fleet.v1 import fleet_service_pb2, fleet_service_pb2_grpc

from controlplane.events import EventSink
from controlplane.fleet.assignments import AssignmentIndex
from controlplane.fleet.calibrations import CalibrationWriter
from controlplane.fleet.liveness import STORE_AGE_SECONDS_MAX
from controlplane.fleet.nodes import NodeWriter
from controlplane.fleet.observations import ObservationWriter, describe_change
from controlplane.fleet.sessions import Session, SessionTable
from controlplane.fleet.stats import StatsWriter
from core.clock import Clock, to_timestamp
from core.errors import FailedPrecondition, FieldViolation, InvalidArgument, Unavailable
from core.store import Mirror, keys

_log = structlog.get_logger(__name__)

_NODE_NAME = re.compile(r"[a-z0-9]([a-z0-9.-]{0,61}[a-z0-9])?")
# An assignments stream says something at least this often, so that an agent can tell a dead one.
PROGRESS_SECONDS = 5.0
# Devices, engines and replicas of one machine stay far below; beyond it a report is a mistake.
REPORT_ITEMS_MAX = 4096
# How long a call waits for the mirror of the plans after a start.
SYNC_SECONDS = 10.0


def _duration(seconds: float) -> Duration:
    message = Duration()
    message.FromMilliseconds(int(seconds * 1000))
    return message


def _require_bounded(name: str, count: int) -> None:
    if count > REPORT_ITEMS_MAX:
        raise InvalidArgument.of(name, f"{count} entries; at most {REPORT_ITEMS_MAX} are accepted")


class FleetServicer(fleet_service_pb2_grpc.FleetServiceServicer):
    """Serves agents."""

    def __init__(
        self,
        *,
        sessions: SessionTable,
        plans: Mirror[replica_pb2.ReplicaAssignment],
        assignments: AssignmentIndex,
        observations: ObservationWriter,
        calibrations: CalibrationWriter,
        nodes: NodeWriter,
        stats: StatsWriter,
        events: EventSink,
        clock: Clock,
        heartbeat_seconds: float,
        stats_seconds: float,
        lost_after_seconds: float,
    ) -> None:
        self._sessions = sessions
        self._plans = plans
        self._assignments = assignments
        self._observations = observations
        self._calibrations = calibrations
        self._nodes = nodes
        self._stats = stats
        self._events = events
        self._clock = clock
        self._heartbeat_seconds = heartbeat_seconds
        self._stats_seconds = stats_seconds
        self._lost_after_seconds = lost_after_seconds

    async def OpenSession(  # noqa: N802 - the generated base class names it
        self, request: fleet_service_pb2.OpenSessionRequest, context: Any
    ) -> fleet_service_pb2.OpenSessionResponse:
        """Opens a session with the inventory and everything that runs."""
        del context
        inventory = request.inventory
        if not _NODE_NAME.fullmatch(inventory.node):
            raise InvalidArgument(
                [
                    FieldViolation(
                        "inventory.node",
                        f"`{inventory.node[:64]}` is not a node name: lower-case letters, digits, `-` and "
                        "`.`, at most 63 characters; start the agent with --node",
                    )
                ]
            )
        _require_bounded("replicas", len(request.replicas))
        _require_bounded("inventory.devices", len(inventory.devices))
        await self._plans.wait_synced(SYNC_SECONDS)
        session = self._sessions.open(inventory.node, request.agent_incarnation)
        try:
            await self._nodes.opened(session, inventory)
            await self._observations.write(inventory.node, request.replicas)
            missing = await self._observations.fail_missing(
                inventory.node, {each.replica for each in request.replicas}, self._clock.now()
            )
        except BaseException:
            self._sessions.close(session)
            raise
        _log.info(
            "session opened",
            node=inventory.node,
            devices=len(inventory.devices),
            replicas=len(request.replicas),
            missing=[each.replica for each in missing],
        )
        return fleet_service_pb2.OpenSessionResponse(
            session_id=session.session_id,
            heartbeat_period=_duration(self._heartbeat_seconds),
            stats_period=_duration(self._stats_seconds),
            lost_after=_duration(self._lost_after_seconds),
        )

    async def Heartbeat(  # noqa: N802 - as above
        self, request: fleet_service_pb2.HeartbeatRequest, context: Any
    ) -> fleet_service_pb2.HeartbeatResponse:
        """Notes that the agent lives.

        Raises:
            Unavailable: This control plane has lost the store. It could not tell the others that the agent
                lives, and they would give its machine up: the agent goes to one of them.
        """
        del context
        self._sessions.hear(request.session_id)
        age_seconds = self._plans.age_seconds()
        if age_seconds > STORE_AGE_SECONDS_MAX:
            raise Unavailable(
                f"this control plane has not heard from etcd for {age_seconds:.0f} s",
                reason="ERROR_REASON_STORE_UNAVAILABLE",
            )
        return fleet_service_pb2.HeartbeatResponse(heartbeat_period=_duration(self._heartbeat_seconds))

    async def WatchAssignments(  # noqa: N802 - as above
        self, request: fleet_service_pb2.WatchAssignmentsRequest, context: Any
    ) -> AsyncIterator[fleet_service_pb2.WatchAssignmentsResponse]:
        """Streams the node's assignments: all of them first, then changes."""
        del context
        session = self._sessions.hear(request.session_id)
        # An agent stops what a complete set does not name: a set that lags behind would cost engines.
        await self._plans.wait_current(SYNC_SECONDS)
        session.assignments_changed.clear()
        sent = self._assignments.of_node(session.node)
        serial = 0
        yield fleet_service_pb2.WatchAssignmentsResponse(
            kind=fleet_service_pb2.ASSIGNMENTS_KIND_COMPLETE,
            results_in=str(serial),
            assigned=[assignment for assignment, _ in sent.values()],
            send_time=to_timestamp(self._clock.now()),
        )
        while True:
            await self._changed_or_progress(session)
            if session.replaced.is_set():
                raise FailedPrecondition(
                    "a newer session of this node was opened",
                    reason="ERROR_REASON_SESSION_INVALID",
                    metadata={"session_id": session.session_id},
                )
            current = self._assignments.of_node(session.node)
            changed = [
                assignment
                for key, (assignment, revision) in current.items()
                if key not in sent or sent[key][1] != revision
            ]
            removed = [sent[key][0].replica for key in sent.keys() - current.keys()]
            sent = current
            yield fleet_service_pb2.WatchAssignmentsResponse(
                kind=fleet_service_pb2.ASSIGNMENTS_KIND_INCREMENTAL,
                applies_to=str(serial),
                results_in=str(serial + 1),
                assigned=changed,
                removed_replicas=removed,
                send_time=to_timestamp(self._clock.now()),
            )
            serial += 1

    @staticmethod
    async def _changed_or_progress(session: Session) -> None:
        try:
            async with asyncio.timeout(PROGRESS_SECONDS):
                await session.assignments_changed.wait()
        except TimeoutError:
            return
        session.assignments_changed.clear()

    async def ReportReplicas(  # noqa: N802 - as above
        self, request: fleet_service_pb2.ReportReplicasRequest, context: Any
    ) -> fleet_service_pb2.ReportReplicasResponse:
        """Stores what the agent reports of its replicas."""
        del context
        _require_bounded("replicas", len(request.replicas))
        _require_bounded("events", len(request.events))
        session = self._sessions.hear(request.session_id)
        moved, unknown = await self._observations.write(session.node, request.replicas)
        for observation in moved:
            await self._calibrations.note(observation)
            change = describe_change(observation)
            if change is not None:
                reason, message, warning = change
                self._events.emit(
                    namespace=observation.namespace,
                    deployment=observation.deployment,
                    replica=observation.replica,
                    node=session.node,
                    reason=reason,
                    message=message,
                    source="nodeagent",
                    warning=warning,
                )
        for event in request.events:
            self._events.emit(
                namespace=event.namespace or "millrace-system",
                deployment=event.deployment,
                replica=event.replica,
                node=session.node,
                reason=event.reason,
                message=event.message,
                source="nodeagent",
                warning=event.warning,
            )
        return fleet_service_pb2.ReportReplicasResponse(unknown=unknown)

    async def ReportStats(  # noqa: N802 - as above
        self, request: fleet_service_pb2.ReportStatsRequest, context: Any
    ) -> fleet_service_pb2.ReportStatsResponse:
        """Keeps the latest samples; they reach the store a moment later, together with others'."""
        del context
        _require_bounded("engines", len(request.engines))
        session = self._sessions.hear(request.session_id)
        self._nodes.note_devices(session.node, request.devices)
        known = [
            sample
            for sample in request.engines
            if (
                assignment := self._plans.get(
                    keys.plan_replica(sample.namespace, sample.deployment, sample.replica)
                )
            )
            is not None
            and assignment.node == session.node
        ]
        self._stats.put(known)
        return fleet_service_pb2.ReportStatsResponse(stats_period=_duration(self._stats_seconds))
