"""NodeAgentService: answers questions about this machine. It takes no orders."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

from millrace.agent.v1 import node_agent_service_pb2 as messages
from millrace.agent.v1 import node_agent_service_pb2_grpc

from core import errors
from core.identity import Role
from nodeagent import logs
from nodeagent.inventory import Inventory
from nodeagent.journal import is_replica_name
from nodeagent.kv_events.registry import KvEvents
from nodeagent.kv_events.stream import follow
from nodeagent.supervisor import Supervisor

SERVICE = "millrace.agent.v1.NodeAgentService"
POLICY: Mapping[str, Role] = {
    f"/{SERVICE}/GetInventory": Role.AGENT,
    f"/{SERVICE}/ListEngines": Role.AGENT,
    f"/{SERVICE}/StreamLogs": Role.AGENT,
    f"/{SERVICE}/StreamKvEvents": Role.ROUTER,
}
TAIL_LINES_DEFAULT = 100
TAIL_LINES_MAX = 10_000


class NodeAgentServicer(node_agent_service_pb2_grpc.NodeAgentServiceServicer):
    """Serves inventory, engines, logs and KV events."""

    def __init__(
        self, *, inventory: Inventory, supervisor: Supervisor, log_directory: Path, kv_events: KvEvents
    ) -> None:
        """Takes what it answers from."""
        self._kv_events = kv_events
        self._inventory = inventory
        self._supervisor = supervisor
        self._log_directory = log_directory

    async def GetInventory(  # noqa: N802 - gRPC's name
        self,
        request: messages.GetInventoryRequest,  # noqa: ARG002 - empty
        context: Any,  # noqa: ARG002 - gRPC's signature
    ) -> messages.GetInventoryResponse:
        """Gets what the machine has."""
        inventory = await asyncio.to_thread(self._inventory.read)
        return messages.GetInventoryResponse(inventory=inventory)

    async def ListEngines(  # noqa: N802 - gRPC's name
        self,
        request: messages.ListEnginesRequest,  # noqa: ARG002 - empty
        context: Any,  # noqa: ARG002 - gRPC's signature
    ) -> messages.ListEnginesResponse:
        """Lists the engines that the agent runs."""
        return messages.ListEnginesResponse(replicas=self._supervisor.observations())

    async def StreamLogs(  # noqa: N802 - gRPC's name
        self,
        request: messages.StreamLogsRequest,
        context: Any,  # noqa: ARG002 - gRPC's signature
    ) -> AsyncIterator[messages.StreamLogsResponse]:
        """Streams an engine's log lines.

        Raises:
            InvalidArgument: `tail_lines` is out of bounds.
            NotFound: No such replica was ever here.
        """
        if not 0 <= request.tail_lines <= TAIL_LINES_MAX:
            raise errors.InvalidArgument.of("tail_lines", f"must be between 0 and {TAIL_LINES_MAX}")
        path = self._find_log(request.replica)
        tail = await asyncio.to_thread(logs.read_tail, path, request.tail_lines or TAIL_LINES_DEFAULT)
        for line in tail.lines:
            yield messages.StreamLogsResponse(line=line)
        if not request.follow:
            return
        async for followed in logs.follow(path, tail.offset, lambda: self._ended(request.replica)):
            if followed is None:
                yield messages.StreamLogsResponse(progress=True)
            else:
                yield messages.StreamLogsResponse(line=followed)

    async def StreamKvEvents(  # noqa: N802 - gRPC's name
        self,
        request: messages.StreamKvEventsRequest,
        context: Any,  # noqa: ARG002 - gRPC's signature
    ) -> AsyncIterator[messages.StreamKvEventsResponse]:
        """Streams which blocks an engine's cache holds.

        Raises:
            NotFound: No such replica is here.
            FailedPrecondition: It publishes no KV events, or has no such rank.
            Unavailable: It is not known yet whether it does.
        """
        if request.replica not in self._supervisor.replicas:
            name = request.replica[:80]
            raise errors.NotFound(f"no replica {name!r} on this node", metadata={"replica": name})
        mirror = self._kv_events.mirror(request.replica, request.data_parallel_rank)
        async for message in follow(mirror, request.epoch, request.sequence):
            yield message

    def _find_log(self, replica: str) -> Path:
        """Finds a log: of a replica that is here, or of one that ended and is still kept."""
        # The pattern keeps a replica's name from leading out of the folder.
        if is_replica_name(replica):
            path = logs.log_path(self._log_directory, replica)
            if replica in self._supervisor.replicas or path.exists():
                return path
        raise errors.NotFound(f"no replica {replica[:80]!r} on this node", metadata={"replica": replica[:80]})

    def _ended(self, name: str) -> bool:
        replica = self._supervisor.replicas.get(name)
        return replica is None or replica.state.terminal
