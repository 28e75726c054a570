"""A FleetService that a test holds in its hands: it assigns, and remembers what an agent reports."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
from google.protobuf.duration_pb2 import Duration
from google.protobuf.struct_pb2 import Struct
from google.protobuf.timestamp_pb2 import Timestamp
from millrace.core.v1 import node_pb2, replica_pb2, stats_pb2, types_pb2
from millrace.fleet.v1 import fleet_service_pb2 as fleet
from millrace.fleet.v1 import fleet_service_pb2_grpc

from core import errors
from core.identity import Principal, Role, TokenAuthenticator
from core.rpc import RpcServer, start_server

TOKEN = "fleet-token-of-a-test"
SERVICE = "millrace.fleet.v1.FleetService"
METHODS = ("OpenSession", "Heartbeat", "WatchAssignments", "ReportReplicas", "ReportStats")


def simulator_assignment(
    replica: str, *, fencing_token: int = 1, **extra_args: Any
) -> replica_pb2.ReplicaAssignment:
    extra = Struct()
    extra.update(extra_args)
    return replica_pb2.ReplicaAssignment(
        namespace="team",
        deployment="chat",
        deployment_uid="uid-1",
        replica=replica,
        generation=1,
        node="node-1",
        devices=[replica_pb2.DeviceClaim(device_id="cpu", memory_bytes=64 * 2**20)],
        launch=replica_pb2.LaunchSpec(
            engine=types_pb2.ENGINE_SIMULATOR,
            model="any/model",
            served_model_name="chat",
            max_model_len=2048,
            extra_args=extra,
        ),
        desired_state=types_pb2.REPLICA_STATE_READY,
        fencing_token=fencing_token,
    )


class FleetForTests(fleet_service_pb2_grpc.FleetServiceServicer):
    """Assignments in, reports out. Versions of the assignments are counted."""

    def __init__(self) -> None:
        self.assignments: dict[str, replica_pb2.ReplicaAssignment] = {}
        self.reports: list[replica_pb2.ReplicaObservation] = []
        self.latest: dict[str, replica_pb2.ReplicaObservation] = {}
        self.events: list[fleet.AgentEvent] = []
        self.stats: dict[str, stats_pb2.EngineStats] = {}
        self.devices: dict[str, stats_pb2.DeviceStats] = {}
        self.opened: list[fleet.OpenSessionRequest] = []
        self.inventory = node_pb2.NodeInventory()
        self.heartbeats = 0
        self.streams = 0
        self.session_id = ""
        # As a scheduler would: what stops is placed anew at once.
        self.replaces_stopped = False
        self.version = 0
        self.changed = asyncio.Event()
        self._queues: list[asyncio.Queue[fleet.WatchAssignmentsResponse]] = []
        self.server: RpcServer | None = None

    async def start(self, port: int = 0) -> int:
        self.server = await start_server(
            host="127.0.0.1",
            port=port,
            register=lambda server: fleet_service_pb2_grpc.add_FleetServiceServicer_to_server(self, server),
            service_names=[SERVICE],
            authenticator=TokenAuthenticator({TOKEN: Principal("fleet", Role.AGENT)}),
            policy={f"/{SERVICE}/{method}": Role.AGENT for method in METHODS},
        )
        return self.server.port

    async def stop(self) -> None:
        if self.server is not None:
            await self.server.stop(0)
            self.server = None
        self._queues.clear()
        self.session_id = ""

    def state(self, replica: str) -> types_pb2.ReplicaState.ValueType:
        latest = self.latest.get(replica)
        return latest.state if latest is not None else types_pb2.REPLICA_STATE_UNSPECIFIED

    def assign(self, *assignments: replica_pb2.ReplicaAssignment) -> None:
        self.assignments |= {each.replica: each for each in assignments}
        self.send(assigned=assignments)

    def remove(self, *replicas: str) -> None:
        for replica in replicas:
            self.assignments.pop(replica, None)
        self.send(removed=replicas)

    def drain(self, replica: str, *, deadline_seconds: float = 30.0) -> None:
        assignment = replica_pb2.ReplicaAssignment()
        assignment.CopyFrom(self.assignments[replica])
        assignment.desired_state = types_pb2.REPLICA_STATE_DRAINING
        deadline = Timestamp()
        deadline.GetCurrentTime()
        deadline.FromMilliseconds(deadline.ToMilliseconds() + round(deadline_seconds * 1000))
        assignment.drain_deadline_time.CopyFrom(deadline)
        self.assign(assignment)

    def send(
        self,
        *,
        assigned: tuple[replica_pb2.ReplicaAssignment, ...] = (),
        removed: tuple[str, ...] = (),
        applies_to: str | None = None,
    ) -> None:
        before = f"v{self.version}"
        self.version += 1
        message = fleet.WatchAssignmentsResponse(
            kind=fleet.ASSIGNMENTS_KIND_INCREMENTAL,
            applies_to=before if applies_to is None else applies_to,
            results_in=f"v{self.version}",
            assigned=assigned,
            removed_replicas=removed,
        )
        for queue in self._queues:
            queue.put_nowait(message)

    def _check(self, session_id: str) -> None:
        if session_id != self.session_id or not session_id:
            raise errors.FailedPrecondition("the session is not known", reason="ERROR_REASON_SESSION_INVALID")

    def _took(self, observations: Any) -> None:
        for observation in observations:
            self.reports.append(observation)
            self.latest[observation.replica] = observation
            if self.replaces_stopped and observation.state == types_pb2.REPLICA_STATE_STOPPED:
                self.assign(simulator_assignment(f"{observation.replica}-again"))
        self.changed.set()

    async def OpenSession(  # noqa: N802 - gRPC's name
        self, request: fleet.OpenSessionRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> fleet.OpenSessionResponse:
        self.opened.append(request)
        self.inventory = request.inventory
        self.session_id = f"session-{len(self.opened)}"
        self._took(request.replicas)
        period = Duration()
        period.FromMilliseconds(100)
        return fleet.OpenSessionResponse(
            session_id=self.session_id, heartbeat_period=period, stats_period=period
        )

    async def Heartbeat(  # noqa: N802 - gRPC's name
        self, request: fleet.HeartbeatRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> fleet.HeartbeatResponse:
        self._check(request.session_id)
        self.heartbeats += 1
        return fleet.HeartbeatResponse()

    async def WatchAssignments(  # noqa: N802 - gRPC's name
        self, request: fleet.WatchAssignmentsRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[fleet.WatchAssignmentsResponse]:
        self._check(request.session_id)
        self.streams += 1
        queue: asyncio.Queue[fleet.WatchAssignmentsResponse] = asyncio.Queue()
        self._queues.append(queue)
        try:
            yield fleet.WatchAssignmentsResponse(
                kind=fleet.ASSIGNMENTS_KIND_COMPLETE,
                results_in=f"v{self.version}",
                assigned=self.assignments.values(),
            )
            while True:
                yield await queue.get()
        finally:
            if queue in self._queues:
                self._queues.remove(queue)

    async def ReportReplicas(  # noqa: N802 - gRPC's name
        self, request: fleet.ReportReplicasRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> fleet.ReportReplicasResponse:
        self._check(request.session_id)
        self._took(request.replicas)
        self.events.extend(request.events)
        return fleet.ReportReplicasResponse()

    async def ReportStats(  # noqa: N802 - gRPC's name
        self, request: fleet.ReportStatsRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> fleet.ReportStatsResponse:
        self._check(request.session_id)
        self.stats |= {each.replica: each for each in request.engines}
        self.devices |= {each.device_id: each for each in request.devices}
        return fleet.ReportStatsResponse()
