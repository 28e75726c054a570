"""Log lines of a deployment: one stream out of those of all its replicas' agents.

In come the view's assignments, out come lines in the order in which they arrive. Each replica has one
stream to its node's agent; while following, replicas that come later join and interrupted streams are
resumed. A slow reader slows the agents down, through gRPC's own flow control.
"""

import asyncio
from collections.abc import AsyncGenerator, Iterable
from dataclasses import dataclass

import grpc
import structlog
from millrace.agent.v1 import node_agent_service_pb2, node_agent_service_pb2_grpc
from millrace.core.v1 import types_pb2
from millrace.scheduler.v1 import scheduler_service_pb2 as messages

from controlplane.api import limits
from controlplane.api.context import ApiContext
from controlplane.api.view import DeploymentId, deployment_not_found, require_identity
from core.backoff import Backoff, BackoffPolicy
from core.errors import InvalidArgument, MillraceError, NotFound, Unavailable
from core.rpc import call_metadata, open_channel
from core.rpc_errors import from_rpc_error
from core.store import keys
from core.tasks import cancel_and_wait

_log = structlog.get_logger(__name__)

# A replica that was just assigned has no log for a moment; an agent restarts within seconds.
_BACKOFF = BackoffPolicy(initial_seconds=0.1, maximum_seconds=5.0)
# Without following, the kept lines of a replica are sent in much less; a dead agent answers with an error.
_WHOLE_LOG_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class _Source:
    """One replica's log: which replica, and on which node."""

    replica: str
    node: str


class _Merger:
    """Reads several logs into one bounded queue."""

    def __init__(self, context: ApiContext, *, tail_lines: int, follow: bool) -> None:
        self._context = context
        self._tail_lines = tail_lines
        self._follow = follow
        self._lines: asyncio.Queue[messages.StreamDeploymentLogsResponse | None] = asyncio.Queue(
            limits.LOG_BUFFER_LINES
        )
        self._readers: dict[str, asyncio.Task[None]] = {}
        self._unreachable: list[Unavailable] = []

    def join(self, source: _Source) -> None:
        """Starts reading a replica's log, once."""
        if source.replica in self._readers or len(self._readers) >= limits.LOG_STREAMS_MAX:
            return
        self._readers[source.replica] = asyncio.create_task(self._read(source), name=f"logs-{source.replica}")

    def keep(self, sources: Iterable[_Source]) -> None:
        """Forgets readers that have ended and whose replica is gone, so that successors find room."""
        present = {source.replica for source in sources}
        for replica in [name for name, task in self._readers.items() if task.done() and name not in present]:
            del self._readers[replica]

    async def line(self) -> messages.StreamDeploymentLogsResponse | None:
        """Takes the next line, waiting for it; None says that a reader has ended or something changed."""
        return await self._lines.get()

    def nudge(self) -> None:
        """Wakes whoever waits for a line; a full queue is awake already."""
        if not self._lines.full():
            self._lines.put_nowait(None)

    @property
    def exhausted(self) -> bool:
        """True when every reader has ended and every line was taken."""
        return self._lines.empty() and all(task.done() for task in self._readers.values())

    def raise_unreachable(self) -> None:
        """Raises the first agent's failure."""
        if self._unreachable:
            raise self._unreachable[0]

    async def close(self) -> None:
        """Ends all readers."""
        await cancel_and_wait(*self._readers.values())

    async def _read(self, source: _Source) -> None:
        """Reads one log to its end; while following, again and again until the replica is gone."""
        backoff, last_line = Backoff(_BACKOFF), ""
        tail_lines = self._tail_lines
        try:
            while True:
                try:
                    async for line in self._stream(source, tail_lines):
                        backoff.succeeded()
                        if tail_lines == 1 and line == last_line:
                            # The line that the interrupted stream ended with.
                            continue
                        tail_lines, last_line = self._tail_lines, line
                        await self._lines.put(
                            messages.StreamDeploymentLogsResponse(
                                replica=source.replica, node=source.node, line=line
                            )
                        )
                    if not self._follow or not self._goes_on(source):
                        return
                except NotFound:
                    if not self._follow or not self._goes_on(source):
                        return
                except Unavailable as error:
                    if not self._follow:
                        self._unreachable.append(error)
                        return
                    if not self._goes_on(source):
                        return
                if last_line:
                    tail_lines = 1
                await self._context.clock.sleep(backoff.failed())
        finally:
            self.nudge()

    async def _stream(self, source: _Source, tail_lines: int) -> AsyncGenerator[str, None]:
        """Yields one replica's lines.

        Raises:
            NotFound: The agent has no log of the replica.
            Unavailable: The agent cannot be reached.
        """
        target = agent_target(self._context, source.node)
        request = node_agent_service_pb2.StreamLogsRequest(
            replica=source.replica, tail_lines=tail_lines, follow=self._follow
        )
        async with open_channel(target, tls=self._context.agent_tls) as channel:
            stub = node_agent_service_pb2_grpc.NodeAgentServiceStub(channel)
            call = stub.StreamLogs(
                request,
                metadata=call_metadata(self._context.fleet_token),
                timeout=None if self._follow else _WHOLE_LOG_SECONDS,
            )
            try:
                async for answer in call:
                    if not answer.progress:
                        yield answer.line
            except grpc.aio.AioRpcError as error:
                raise _agent_error(error, source) from error
            finally:
                call.cancel()

    def _goes_on(self, source: _Source) -> bool:
        """Tells whether a replica may still write lines."""
        return any(each.replica == source.replica for each in self._context.view.assignments.items.values())


class Logs:
    """Streams the log lines of deployments."""

    def __init__(self, context: ApiContext) -> None:
        self._context = context

    async def stream(
        self, request: messages.StreamDeploymentLogsRequest
    ) -> AsyncGenerator[messages.StreamDeploymentLogsResponse, None]:
        """Streams a deployment's lines.

        Raises:
            InvalidArgument: tail_lines is out of range.
            NotFound: There is no such deployment, or no such replica.
            Unavailable: An agent cannot be reached (only without follow; while following it is retried).
        """
        if not 0 <= request.tail_lines <= limits.LOG_TAIL_LINES_MAX:
            raise InvalidArgument.of(
                "tail_lines", f"{request.tail_lines} is out of range; give 0 to {limits.LOG_TAIL_LINES_MAX}"
            )
        identity = (request.namespace, request.name)
        sources = self._sources(identity, request.replica)
        self._require(identity, request.replica, sources)
        merger = _Merger(
            self._context,
            tail_lines=request.tail_lines or limits.LOG_TAIL_LINES_DEFAULT,
            follow=request.follow,
        )
        unsubscribe = self._context.view.subscribe(
            lambda changed: merger.nudge() if identity in changed else None
        )
        try:
            while True:
                for source in sources:
                    merger.join(source)
                if merger.exhausted and not request.follow:
                    break
                line = await merger.line()
                if line is not None:
                    yield line
                    continue
                if request.follow:
                    sources = self._sources(identity, request.replica)
                    merger.keep(sources)
                    if not sources and self._context.view.find_deployment(identity) is None:
                        break
            merger.raise_unreachable()
        finally:
            unsubscribe()
            await merger.close()

    def _sources(self, identity: DeploymentId, replica: str) -> list[_Source]:
        """Every replica of a deployment that has, or had, an engine; those being removed included."""
        view = self._context.view
        placed = {each.replica: each.node for each in view.assignments_of(identity)}
        placed.update({each.replica: each.node for each in view.observations_of(identity)})
        external = view.find_deployment(identity)
        if external is not None and external.spec.engine == types_pb2.ENGINE_EXTERNAL:
            # Someone else runs it, so there is no log to read.
            return []
        return [
            _Source(name, node) for name, node in sorted(placed.items()) if not replica or name == replica
        ]

    def _require(self, identity: DeploymentId, replica: str, sources: list[_Source]) -> None:
        require_identity(*identity)
        self._context.view.require_synced()
        if not sources and self._context.view.find_deployment(identity) is None:
            raise deployment_not_found(*identity)
        if replica and not sources:
            raise NotFound(
                f"deployment `{identity[1]}` has no replica `{replica[:80]}`",
                metadata={"namespace": identity[0], "deployment": identity[1], "replica": replica[:80]},
            )


def agent_target(context: ApiContext, node: str) -> str:
    """Returns where a node's agent can be dialled.

    Raises:
        Unavailable: It is not known.
    """
    machine = context.view.machines.get(keys.actual_node(node))
    if machine is None or not machine.inventory.agent_target:
        raise Unavailable(
            f"it is not known where the agent of node `{node}` can be reached",
            reason="ERROR_REASON_AGENT_UNREACHABLE",
            metadata={"node": node},
        )
    return machine.inventory.agent_target


def _agent_error(error: grpc.aio.AioRpcError, source: _Source) -> MillraceError:
    converted = from_rpc_error(error)
    if isinstance(converted, NotFound):
        return converted
    _log.info("agent's log stream ended", node=source.node, replica=source.replica, error=converted.message)
    return Unavailable(
        f"the agent of node `{source.node}` cannot be reached: {converted.message}",
        reason="ERROR_REASON_AGENT_UNREACHABLE",
        metadata={"node": source.node},
    )
