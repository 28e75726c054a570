"""The session with the control plane: the agent dials in, nothing dials it to give orders.

Out go the inventory, heartbeats, reports and samples; in come assignments. Whatever breaks a session
(an answer that it is not known any more, a control plane that is away) leads to a new one after a short
back-off, with the next control plane where there are several. Engines are never touched by that: only an
assignment stops an engine.
"""

import asyncio
import random
import secrets
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import grpc
import structlog
from google.protobuf.duration_pb2 import Duration
from millrace.core.v1 import node_pb2
from millrace.fleet.v1 import fleet_service_pb2, fleet_service_pb2_grpc

from core import errors
from core.backoff import Backoff, BackoffPolicy
from core.clock import Clock, from_timestamp
from core.rpc import call_metadata
from core.rpc_errors import from_rpc_error
from nodeagent.reporting import Reporter
from nodeagent.stats import StatsCollector
from nodeagent.supervisor import Supervisor

_log = structlog.get_logger(__name__)
_T = TypeVar("_T")

# A control plane that restarts is back within seconds, and all agents come at once.
SESSION_BACKOFF = BackoffPolicy(initial_seconds=0.1, maximum_seconds=1.0)
# A call that takes longer will not succeed; the next attempt may reach another control plane. Short, since a
# control plane that hangs holds up the report of an engine that has ended.
CALL_SECONDS = 3.0
# Opening writes to etcd, which may be electing a leader, and all agents may come at once.
OPEN_SECONDS = 5.0
# The stream of assignments shows a sign of life more often than this, or it is dead.
STREAM_SILENCE_SECONDS = 15.0
# Periods that a control plane may set: neither a flood nor a silence that looks like death.
PERIOD_SECONDS_MIN, PERIOD_SECONDS_MAX = 0.05, 60.0
_JITTER_RATIO = 0.1
SESSION_INVALID = "ERROR_REASON_SESSION_INVALID"


@dataclass(slots=True)
class SessionState:
    """What is known of the session, for metrics and tests.

    Attributes:
        target: Control plane that the session is with, or that is tried next.
        connected: True while a session is open.
        session_id: Identifier of the present or last session.
        opened_total: Sessions opened since the agent started.
    """

    target: str
    connected: bool = False
    session_id: str = ""
    opened_total: int = 0


class Session:
    """Keeps a session open for ever."""

    def __init__(
        self,
        *,
        channels: Mapping[str, grpc.aio.Channel],
        token: str,
        inventory: Callable[[], node_pb2.NodeInventory],
        supervisor: Supervisor,
        reporter: Reporter,
        stats: StatsCollector,
        clock: Clock,
    ) -> None:
        """Takes its parts; the channels, one for each control plane's address, belong to the caller."""
        self._stubs: dict[str, fleet_service_pb2_grpc.FleetServiceAsyncStub] = {
            target: fleet_service_pb2_grpc.FleetServiceStub(channel) for target, channel in channels.items()
        }
        self._metadata = call_metadata(token)
        self._inventory = inventory
        self._supervisor = supervisor
        self._reporter = reporter
        self._stats = stats
        self._clock = clock
        self._incarnation = secrets.token_hex(8)
        self._heartbeat_seconds = 2.0
        self._random = random.Random()  # noqa: S311 - spreads calls in time, guards nothing
        # Agents begin at different control planes, so that sessions spread.
        self.state = SessionState(target=self._random.choice(list(channels)))

    @property
    def _stub(self) -> "fleet_service_pb2_grpc.FleetServiceAsyncStub":
        return self._stubs[self.state.target]

    async def run(self) -> None:
        """Opens sessions until cancelled."""
        backoff = Backoff(SESSION_BACKOFF)
        while True:
            try:
                await self._open()
                backoff.succeeded()
                await self._hold()
            except* errors.MillraceError as group:
                error = _first(group)
                _log.warning(
                    "session ended", controlplane=self.state.target, error=error.message, reason=error.reason
                )
                # One that asks for a new session is there and well; any other trouble is left behind.
                if error.reason != SESSION_INVALID:
                    self._turn_to_next()
            finally:
                self.state.connected = False
            await self._clock.sleep(backoff.failed())

    def _turn_to_next(self) -> None:
        targets = list(self._stubs)
        self.state.target = targets[(targets.index(self.state.target) + 1) % len(targets)]

    async def _open(self) -> None:
        batch = self._reporter.batch()
        # What is forgotten and not yet reported belongs to the whole picture too.
        replicas = {each.replica: each for each in [*batch.observations, *self._supervisor.observations()]}
        inventory = await asyncio.to_thread(self._inventory)
        response = await self._call(
            self._stub.OpenSession,
            fleet_service_pb2.OpenSessionRequest(
                inventory=inventory, replicas=replicas.values(), agent_incarnation=self._incarnation
            ),
            timeout_seconds=OPEN_SECONDS,
        )
        self._reporter.accepted(batch, with_events=False)
        self.state.session_id = response.session_id
        self.state.connected = True
        self.state.opened_total += 1
        self._heartbeat_seconds = _seconds(response.heartbeat_period, self._heartbeat_seconds)
        self._stats.period_seconds = _seconds(response.stats_period, self._stats.period_seconds)
        _log.info(
            "session opened",
            controlplane=self.state.target,
            session_id=response.session_id,
            replicas=len(replicas),
        )

    async def _hold(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._beat(), name="heartbeat")
            tasks.create_task(self._follow_assignments(), name="assignments")
            tasks.create_task(self._report_replicas(), name="report-replicas")
            tasks.create_task(self._report_stats(), name="report-stats")

    async def _beat(self) -> None:
        while True:
            await self._clock.sleep(self._jittered(self._heartbeat_seconds))
            request = fleet_service_pb2.HeartbeatRequest(session_id=self.state.session_id)
            response = await self._call(self._stub.Heartbeat, request)
            self._heartbeat_seconds = _seconds(response.heartbeat_period, self._heartbeat_seconds)

    async def _report_replicas(self) -> None:
        while True:
            await self._reporter.wait()
            batch = self._reporter.batch()
            request = fleet_service_pb2.ReportReplicasRequest(
                session_id=self.state.session_id, replicas=batch.observations, events=batch.events
            )
            response = await self._call(self._stub.ReportReplicas, request)
            self._reporter.accepted(batch)
            if response.unknown:
                _log.info("the control plane does not know replicas", replicas=list(response.unknown))

    async def _report_stats(self) -> None:
        while True:
            await self._clock.sleep(self._jittered(self._stats.period_seconds))
            request = fleet_service_pb2.ReportStatsRequest(
                session_id=self.state.session_id,
                engines=self._stats.engine_samples(),
                devices=self._stats.device_samples(),
            )
            response = await self._call(self._stub.ReportStats, request)
            self._stats.period_seconds = _seconds(response.stats_period, self._stats.period_seconds)

    # --- assignments --------------------------------------------------------------------------------

    async def _follow_assignments(self) -> None:
        """Follows the stream; a gap, a silence or its end leads to a new one within the session."""
        backoff = Backoff(SESSION_BACKOFF)
        while True:
            request = fleet_service_pb2.WatchAssignmentsRequest(session_id=self.state.session_id)
            call = self._stub.WatchAssignments(request, metadata=self._metadata)
            try:
                why = await self._follow_stream(call, backoff)
            except grpc.aio.AioRpcError as error:
                raise from_rpc_error(error) from error
            finally:
                call.cancel()
            _log.warning("following assignments anew", why=why)
            await self._clock.sleep(backoff.failed())

    async def _follow_stream(
        self,
        call: grpc.aio.UnaryStreamCall[
            fleet_service_pb2.WatchAssignmentsRequest, fleet_service_pb2.WatchAssignmentsResponse
        ],
        backoff: Backoff,
    ) -> str:
        """Applies messages until the stream cannot be trusted any more; returns why."""
        version: str | None = None
        while True:
            try:
                async with asyncio.timeout(STREAM_SILENCE_SECONDS):
                    message = await call.read()
            except TimeoutError:
                return f"no sign of life for {STREAM_SILENCE_SECONDS:.0f} s"
            if not isinstance(message, fleet_service_pb2.WatchAssignmentsResponse):
                return "the stream ended"
            sent_at = from_timestamp(message.send_time)
            if message.kind == fleet_service_pb2.ASSIGNMENTS_KIND_COMPLETE:
                _log.info("all assignments", replicas=[each.replica for each in message.assigned])
                await self._supervisor.apply_complete(message.assigned, sent_at=sent_at)
            elif version is None:
                return "a change came before the complete set"
            elif message.applies_to != version:
                return f"a change was missed: it builds on {message.applies_to!r}, known is {version!r}"
            else:
                await self._supervisor.apply_change(
                    message.assigned, message.removed_replicas, sent_at=sent_at
                )
            version = message.results_in
            backoff.succeeded()

    # --- shared -------------------------------------------------------------------------------------

    async def _call(
        self, method: Callable[..., Awaitable[_T]], request: object, *, timeout_seconds: float = CALL_SECONDS
    ) -> _T:
        try:
            return await method(request, metadata=self._metadata, timeout=timeout_seconds)
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from error

    def _jittered(self, seconds: float) -> float:
        """Spreads calls of many agents; never later than asked for."""
        return seconds * (1.0 - _JITTER_RATIO * self._random.random())


def _seconds(duration: Duration, otherwise: float) -> float:
    """Reads a period; one that was not set keeps the present one."""
    seconds = duration.ToTimedelta().total_seconds()
    return min(PERIOD_SECONDS_MAX, max(PERIOD_SECONDS_MIN, seconds)) if seconds > 0 else otherwise


def _first(group: BaseExceptionGroup[errors.MillraceError]) -> errors.MillraceError:
    found: BaseException = group
    while isinstance(found, BaseExceptionGroup):
        found = found.exceptions[0]
    assert isinstance(found, errors.MillraceError)
    return found
