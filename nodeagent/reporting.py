"""What the control plane has not heard yet: the latest observation of each replica, and events.

Replicas are put in when they change; the session takes them out once the control plane has accepted
them. Only the latest observation of a replica is kept, so that a long silence costs no memory. An
observation that changes while its report is on the way stays in.
"""

import asyncio
from collections import deque
from dataclasses import dataclass

import structlog
from millrace.core.v1 import replica_pb2
from millrace.fleet.v1 import fleet_service_pb2

_log = structlog.get_logger(__name__)

# Events are told, not owed: beyond this the oldest are dropped with a log line.
EVENTS_MAX = 1000


@dataclass(frozen=True, slots=True)
class Batch:
    """What one report carries.

    Attributes:
        versions: Replica to the version of its observation in this batch.
        observations: The observations.
        events: The events.
    """

    versions: dict[str, int]
    observations: list[replica_pb2.ReplicaObservation]
    events: list[fleet_service_pb2.AgentEvent]


class Reporter:
    """Collects what is to be reported."""

    def __init__(self) -> None:
        self._pending: dict[str, tuple[int, replica_pb2.ReplicaObservation]] = {}
        self._events: deque[fleet_service_pb2.AgentEvent] = deque()
        self._version = 0
        self._filled = asyncio.Event()
        self._drained = asyncio.Event()
        self._drained.set()

    def put(self, observation: replica_pb2.ReplicaObservation) -> None:
        """Puts in a replica's present observation; it is copied."""
        self._version += 1
        copy = replica_pb2.ReplicaObservation()
        copy.CopyFrom(observation)
        self._pending[observation.replica] = (self._version, copy)
        self._filled.set()
        self._drained.clear()

    def put_event(self, event: fleet_service_pb2.AgentEvent) -> None:
        """Puts in an event."""
        if len(self._events) >= EVENTS_MAX:
            dropped = self._events.popleft()
            _log.warning("an event was never reported", reason=dropped.reason, replica=dropped.replica)
        self._events.append(event)
        self._filled.set()
        self._drained.clear()

    def batch(self) -> Batch:
        """Returns everything that is pending."""
        return Batch(
            versions={name: version for name, (version, _) in self._pending.items()},
            observations=[observation for _, observation in self._pending.values()],
            events=list(self._events),
        )

    def accepted(self, batch: Batch, *, with_events: bool = True) -> None:
        """Takes out what the control plane has accepted and what has not changed since."""
        for name, version in batch.versions.items():
            if name in self._pending and self._pending[name][0] == version:
                del self._pending[name]
        if with_events:
            # By identity: events may have been dropped at the front meanwhile.
            told = {id(event) for event in batch.events}
            self._events = deque(event for event in self._events if id(event) not in told)
        if not self._pending and not self._events:
            self._filled.clear()
            self._drained.set()

    async def wait(self) -> None:
        """Waits until something is pending."""
        await self._filled.wait()

    async def drained(self) -> None:
        """Waits until nothing is pending."""
        await self._drained.wait()
