"""Streams that outlive their connection: watch deployments, watch events, read logs.

In come requests that carry a resource version, out come changes in order. A watch resumes after its last
version when the connection or the server goes away, and lists again when that version is gone; what
vanished meanwhile is then reported as deleted, so that a consumer's picture is right either way. It must
not try forever: after `PATIENCE_SECONDS` without a message it gives up with Unavailable.
"""

import asyncio
import enum
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

import grpc
from millrace.core.v1.deployment_pb2 import Deployment
from millrace.core.v1.event_pb2 import Event
from millrace.scheduler.v1 import scheduler_service_pb2 as messages

from millrace_client import errors
from millrace_client.calling import Caller, backoff_seconds, ended_by_peer
from millrace_client.rpc_status import from_rpc_error

if TYPE_CHECKING:
    from millrace.scheduler.v1.scheduler_service_pb2_grpc import SchedulerServiceAsyncStub

Request = TypeVar("Request")
Message = TypeVar("Message")

# Longer than a restart of the control plane or an election of its leader, shorter than a person's
# patience in front of a frozen screen.
PATIENCE_SECONDS = 60.0
# A re-list repeats at most what the server keeps; beyond this many, repeats are possible and harmless.
SEEN_EVENTS_MAX = 10_000
# Ten thousand lines of several replicas through two hops; more means that something hangs.
LOGS_TIMEOUT_SECONDS = 60.0
LOGS_ATTEMPTS_MAX = 4


class ChangeKind(enum.Enum):
    """What a watch says."""

    CHANGED = "changed"
    DELETED = "deleted"
    # The snapshot is complete: everything that exists has been reported.
    SYNCED = "synced"


@dataclass(frozen=True, slots=True)
class DeploymentChange:
    """One message of a watch.

    Attributes:
        kind: What happened.
        deployment: The resource; with DELETED only namespace and name are set, with SYNCED it is None.
        resource_version: Version to resume from.
    """

    kind: ChangeKind
    deployment: Deployment | None
    resource_version: str


class _Patience:
    """Counts failures in a row, waits between them, and ends when nothing has come for too long."""

    def __init__(self, limit_seconds: float) -> None:
        self._limit_seconds = limit_seconds
        self._failures = 0
        self._last_message = asyncio.get_running_loop().time()

    def succeeded(self) -> None:
        self._failures = 0
        self._last_message = asyncio.get_running_loop().time()

    async def failed(self, failure: errors.MillraceError) -> None:
        """Waits before the next attempt; raises the failure once the patience is over."""
        self._failures += 1
        wait_seconds = backoff_seconds(self._failures)
        silent_seconds = asyncio.get_running_loop().time() + wait_seconds - self._last_message
        if silent_seconds > self._limit_seconds:
            raise failure
        await asyncio.sleep(wait_seconds)


async def _messages(
    stream: "grpc.aio.UnaryStreamCall[Request, Message]", target: str
) -> AsyncGenerator[Message, None]:
    """Reads a stream to its end, with our errors, and never leaves it open."""
    try:
        async for message in stream:
            yield message
    except grpc.aio.AioRpcError as error:
        raise from_rpc_error(error, target=target) from error
    except asyncio.CancelledError as error:
        if not ended_by_peer():
            raise
        raise errors.Unavailable(f"the server at {target} ended the stream") from error
    finally:
        stream.cancel()


@dataclass(slots=True)
class _Position:
    """Where a watch is: the version to resume from, empty while a snapshot is under way."""

    resource_version: str
    in_snapshot: bool = field(init=False)

    def __post_init__(self) -> None:
        self.in_snapshot = not self.resource_version

    def moved(self, resource_version: str, *, snapshot_end: bool) -> None:
        if snapshot_end:
            self.in_snapshot = False
        if not self.in_snapshot:
            # Within a snapshot there is nothing to resume from until it is complete.
            self.resource_version = resource_version

    def lost(self) -> None:
        self.resource_version = ""
        self.in_snapshot = True

    def recovers(self, failure: errors.MillraceError) -> bool:
        """Tells whether the watch can go on after the failure, from here or from a new snapshot."""
        if isinstance(failure, errors.OutOfRange) and not self.in_snapshot:
            self.lost()
            return True
        # A watcher that was cut for being slow resumes where it was: what it missed is not lost.
        return isinstance(failure, errors.Unavailable | errors.ResourceExhausted)


class _Picture:
    """The deployments that a consumer of the watch believes in."""

    def __init__(self) -> None:
        self._known: set[tuple[str, str]] = set()
        self._listed: set[tuple[str, str]] = set()

    def begin(self) -> None:
        self._listed.clear()

    def take(self, message: messages.WatchDeploymentsResponse) -> list[DeploymentChange]:
        """Returns what the consumer has to be told."""
        kind, version = message.WhichOneof("kind"), message.resource_version
        if kind == "changed":
            key = (message.changed.namespace, message.changed.name)
            self._known.add(key)
            self._listed.add(key)
            return [DeploymentChange(ChangeKind.CHANGED, message.changed, version)]
        if kind == "deleted":
            key = (message.deleted.namespace, message.deleted.name)
            self._known.discard(key)
            self._listed.discard(key)
            return [DeploymentChange(ChangeKind.DELETED, message.deleted, version)]
        if kind == "snapshot_end":
            vanished = [
                DeploymentChange(ChangeKind.DELETED, Deployment(namespace=namespace, name=name), version)
                for namespace, name in sorted(self._known - self._listed)
            ]
            self._known = set(self._listed)
            return [*vanished, DeploymentChange(ChangeKind.SYNCED, None, version)]
        return []


async def follow_deployments(
    stub: "SchedulerServiceAsyncStub",
    caller: Caller,
    *,
    namespace: str,
    name: str,
    resource_version: str,
    patience_seconds: float,
) -> AsyncGenerator[DeploymentChange, None]:
    """Yields changes without end; see `MillraceClient.watch`."""
    patience = _Patience(patience_seconds)
    position = _Position(resource_version)
    picture = _Picture()
    while True:
        request = messages.WatchDeploymentsRequest(
            namespace=namespace, name=name, resource_version=position.resource_version
        )
        picture.begin()
        failure: errors.MillraceError = errors.Unavailable("the server keeps ending the watch")
        stream = stub.WatchDeployments(request, metadata=caller.metadata())
        try:
            async with aclosing(_messages(stream, caller.target)) as received:
                async for message in received:
                    patience.succeeded()
                    for change in picture.take(message):
                        yield change
                    position.moved(
                        message.resource_version, snapshot_end=message.WhichOneof("kind") == "snapshot_end"
                    )
        except errors.MillraceError as error:
            if not position.recovers(error):
                raise
            failure = error
        await patience.failed(failure)


async def follow_events(
    stub: "SchedulerServiceAsyncStub",
    caller: Caller,
    *,
    namespace: str,
    deployment: str,
    follow: bool,
    resource_version: str,
    patience_seconds: float,
) -> AsyncGenerator[Event, None]:
    """Yields kept events and, with `follow`, new ones without end; see `MillraceClient.events`."""
    patience = _Patience(patience_seconds)
    position = _Position(resource_version)
    seen: dict[str, None] = {}
    while True:
        request = messages.WatchEventsRequest(
            namespace=namespace,
            deployment=deployment,
            follow=follow,
            resource_version=position.resource_version,
        )
        failure: errors.MillraceError = errors.Unavailable("the server keeps ending the stream of events")
        stream = stub.WatchEvents(
            request, metadata=caller.metadata(), timeout=None if follow else caller.timeout_seconds
        )
        try:
            async with aclosing(_messages(stream, caller.target)) as received:
                async for message in received:
                    patience.succeeded()
                    kind = message.WhichOneof("kind")
                    if kind == "event" and message.event.id not in seen:
                        seen[message.event.id] = None
                        if len(seen) > SEEN_EVENTS_MAX:
                            seen.pop(next(iter(seen)))
                        yield message.event
                    position.moved(message.resource_version, snapshot_end=kind == "snapshot_end")
            if not follow:
                return
        except errors.MillraceError as error:
            if not position.recovers(error) or isinstance(error, errors.DeadlineExceeded):
                raise
            failure = error
        await patience.failed(failure)


async def read_logs(
    stub: "SchedulerServiceAsyncStub", caller: Caller, request: messages.StreamDeploymentLogsRequest
) -> AsyncGenerator[messages.StreamDeploymentLogsResponse, None]:
    """Yields log lines; see `MillraceClient.logs`.

    A stream that breaks after its first line is not resumed: lines carry no position, and a guess would
    repeat or drop some.
    """
    failures = 0
    while True:
        stream = stub.StreamDeploymentLogs(
            request, metadata=caller.metadata(), timeout=None if request.follow else LOGS_TIMEOUT_SECONDS
        )
        begun = False
        try:
            async with aclosing(_messages(stream, caller.target)) as received:
                async for line in received:
                    begun = True
                    yield line
            return
        except errors.Unavailable as error:
            failures += 1
            if begun or isinstance(error, errors.DeadlineExceeded) or failures >= LOGS_ATTEMPTS_MAX:
                raise
        await asyncio.sleep(backoff_seconds(failures))
