"""The event log: what happened and why, kept for a day.

In come facts from any part of the control plane through `emit`, which never waits; out go `core.Event`
records under `events/<namespace>/<ulid>` on leases, so that the store forgets them by itself. The log
must not slow or fail its callers: without a store it keeps its queue and writes later, and when the
queue is full the oldest facts go first, counted and logged.
"""

import asyncio
from collections import deque
from typing import Protocol

import structlog
from millrace.core.v1 import event_pb2, types_pb2
from prometheus_client import Counter

from core.backoff import Backoff, BackoffPolicy
from core.clock import Clock, to_timestamp
from core.errors import MillraceError
from core.store import keys
from core.store.types import Lease, LeaseLost, Put, Store
from core.ulid import UlidMaker

_log = structlog.get_logger(__name__)

SYSTEM_NAMESPACE = "millrace-system"
"""Namespace of events that concern no tenant."""

# About an hour of a very busy cluster; one event is well below 1 KiB, so the queue stays below 10 MiB.
QUEUE_LENGTH_MAX = 10_000
# Far below the store's 128 operations, so that one transaction stays small.
BATCH_LENGTH_MAX = 64
# A lease is shared by all events of one hour: one lease an event would burden the store for nothing.
BUCKET_SECONDS = 3600
# The last event of an hour still lives for 24 h.
LEASE_SECONDS = 24 * 3600 + BUCKET_SECONDS
# Longer accounts are cut: the log holds sentences, the engines' logs hold the rest.
MESSAGE_LENGTH_MAX = 4096
# The store's own outage lasts seconds; 5 s keeps the events timely once it is back.
_BACKOFF = BackoffPolicy(initial_seconds=0.1, maximum_seconds=5.0)

_written = Counter("millrace_events_written_total", "Events that reached the store")
_dropped = Counter("millrace_events_dropped_total", "Events dropped because the queue was full")


class EventSink(Protocol):
    """Takes facts; `EventLog` is the one that keeps them."""

    def emit(
        self,
        *,
        namespace: str,
        reason: str,
        message: str,
        source: str,
        deployment: str = "",
        replica: str = "",
        node: str = "",
        warning: bool = False,
    ) -> None:
        """Records a fact without waiting."""
        ...


class EventLog:
    """Queues events and writes them to the store.

    Attributes:
        dropped: Events lost to a full queue since the start.
    """

    def __init__(self, store: Store, clock: Clock) -> None:
        self.dropped = 0
        self._store = store
        self._clock = clock
        self._maker = UlidMaker()
        self._queue: deque[event_pb2.Event] = deque()
        self._batch: list[event_pb2.Event] = []
        self._wake = asyncio.Event()
        self._empty = asyncio.Event()
        self._empty.set()
        self._lease: Lease | None = None
        self._lease_bucket = -1

    def emit(
        self,
        *,
        namespace: str,
        reason: str,
        message: str,
        source: str,
        deployment: str = "",
        replica: str = "",
        node: str = "",
        warning: bool = False,
    ) -> None:
        """Records a fact without waiting.

        Args:
            namespace: Tenant; empty for what concerns none.
            reason: Machine-readable cause, in CamelCase.
            message: Account for a person, with the why.
            source: Part that says it: api, scheduler, reconciler, fleet, nodeagent.
            deployment: Deployment that it speaks of.
            replica: Replica that it speaks of.
            node: Node that it speaks of.
            warning: True when someone should look.
        """
        now = self._clock.now()
        severity = types_pb2.EVENT_SEVERITY_WARNING if warning else types_pb2.EVENT_SEVERITY_NORMAL
        event = event_pb2.Event(
            id=self._maker.make(now),
            time=to_timestamp(now),
            namespace=namespace or SYSTEM_NAMESPACE,
            deployment=deployment,
            replica=replica,
            node=node,
            severity=severity,
            reason=reason,
            message=message[:MESSAGE_LENGTH_MAX],
            source=source,
        )
        if len(self._queue) >= QUEUE_LENGTH_MAX:
            self._queue.popleft()
            if self.dropped % 1000 == 0:
                _log.warning("event queue is full: the oldest events are dropped", dropped=self.dropped + 1)
            self.dropped += 1
            _dropped.inc()
        self._queue.append(event)
        self._empty.clear()
        self._wake.set()

    async def drained(self) -> None:
        """Waits until everything emitted so far has been written; bound the wait outside."""
        await self._empty.wait()

    async def run(self) -> None:
        """Writes events for ever; outages of the store are waited out with back-off."""
        backoff = Backoff(_BACKOFF)
        while True:
            if not self._batch and not self._queue:
                self._empty.set()
                self._wake.clear()
                await self._wake.wait()
            while self._queue and len(self._batch) < BATCH_LENGTH_MAX:
                self._batch.append(self._queue.popleft())
            try:
                await self._write(self._batch)
            except LeaseLost:
                # Another process or an operator revoked it; a new one costs one call.
                self._lease = None
            except MillraceError as error:
                wait_seconds = backoff.failed()
                if backoff.failures == 1:
                    _log.warning("events wait for the store", error=error.message, queued=len(self._queue))
                await self._clock.sleep(wait_seconds)
            else:
                backoff.succeeded()
                _written.inc(len(self._batch))
                self._batch = []

    async def _write(self, batch: list[event_pb2.Event]) -> None:
        lease = await self._current_lease()
        # A retry after an unknown outcome writes the same keys again, which changes nothing.
        await self._store.commit(
            [
                Put(keys.event(event.namespace, event.id), event.SerializeToString(), lease.lease_id)
                for event in batch
            ]
        )

    async def _current_lease(self) -> Lease:
        bucket = int(self._clock.monotonic() // BUCKET_SECONDS)
        if self._lease is None or bucket != self._lease_bucket:
            self._lease = await self._store.grant_lease(LEASE_SECONDS)
            self._lease_bucket = bucket
        return self._lease
