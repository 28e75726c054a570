"""Watches: a snapshot, its end, then every change, with a version to resume from.

In come the view's announcements and the store's event prefix, out go streams of messages. A watcher that
does not keep up is cut once its buffer is full: it lists again, which costs less than memory without
bound. Versions are revisions of the store, and resuming asks the store itself what changed since, so
that a restarted control plane resumes as well as the one that gave the version out.
"""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import aclosing, contextmanager
from typing import Generic, TypeVar

from millrace.core.v1 import deployment_pb2, event_pb2
from millrace.scheduler.v1 import scheduler_service_pb2 as messages
from prometheus_client import Gauge

from controlplane.api import limits, validation
from controlplane.api.context import ApiContext
from controlplane.api.view import DeploymentId, identity_of_key
from core.errors import InvalidArgument, OutOfRange, ResourceExhausted
from core.store import keys
from core.store.types import Compacted, KeyValue, Page, StoreError
from core.store.waiting import within
from core.tasks import cancel_and_wait

_watchers = Gauge("millrace_api_watchers", "Open watches")

T = TypeVar("T")

_DEPLOYMENT_PREFIXES = (
    keys.SPEC_DEPLOYMENTS, keys.PLAN_DEPLOYMENTS, keys.PLAN_REPLICAS, keys.ACTUAL_REPLICAS,
)  # fmt: skip
# Events are read so many at a time.
_EVENTS_PAGE = 1000


class Buffer(Generic[T]):
    """Messages for one watcher; refuses to grow."""

    def __init__(self) -> None:
        self._items: deque[T] = deque()
        self._ready = asyncio.Event()
        self._error: Exception | None = None

    def put(self, item: T) -> None:
        """Adds a message; a full buffer ends the watch instead."""
        if self._error is not None:
            return
        if len(self._items) >= limits.WATCH_BUFFER_MAX:
            self.fail(
                ResourceExhausted(
                    f"the watcher is more than {limits.WATCH_BUFFER_MAX} messages behind; list again",
                    metadata={"buffer": str(limits.WATCH_BUFFER_MAX)},
                )
            )
            return
        self._items.append(item)
        self._ready.set()

    def fail(self, error: Exception) -> None:
        """Ends the watch with an error, once what is buffered has been taken."""
        self._error = self._error or error
        self._ready.set()

    def clear(self) -> None:
        """Forgets what is buffered."""
        self._items.clear()

    async def get(self) -> T:
        """Takes the next message, waiting for it.

        Raises:
            Exception: What ended the watch.
        """
        while not self._items:
            if self._error is not None:
                raise self._error
            self._ready.clear()
            await self._ready.wait()
        return self._items.popleft()


class Watches:
    """Serves watches of deployments and events."""

    def __init__(self, context: ApiContext) -> None:
        self._context = context
        self._open = 0
        self._subscribers: dict[
            Buffer[messages.WatchDeploymentsResponse], Callable[[DeploymentId], bool]
        ] = {}
        context.view.subscribe(self._changed)

    async def deployments(
        self, request: messages.WatchDeploymentsRequest
    ) -> AsyncGenerator[messages.WatchDeploymentsResponse, None]:
        """Watches deployments.

        Raises:
            InvalidArgument: The version or the namespace is none, or a name comes without a namespace.
            OutOfRange: The version is too old.
            ResourceExhausted: The watcher is too slow, or there are too many.
        """
        if request.name and not request.namespace:
            raise InvalidArgument.of("namespace", "is empty; a name is unique within its namespace only")
        validation.check_namespace_filter(request.namespace)
        self._context.view.require_synced()
        wanted = _selects(request.namespace, request.name)
        buffer: Buffer[messages.WatchDeploymentsResponse] = Buffer()
        with self._admitted():
            self._subscribers[buffer] = wanted
            try:
                if request.resource_version:
                    first = await self._since(_revision(request.resource_version), wanted)
                    # What came meanwhile is covered: the state that is sent is that of now.
                    buffer.clear()
                    opening = first()
                else:
                    opening = self._snapshot(wanted)
                for message in opening:
                    yield message
                async for message in self._follow(buffer, self._deployment_progress):
                    yield message
            finally:
                del self._subscribers[buffer]

    async def events(
        self, request: messages.WatchEventsRequest
    ) -> AsyncGenerator[messages.WatchEventsResponse, None]:
        """Replays the kept events and follows new ones.

        Raises:
            InvalidArgument: The version or the namespace is none, or a deployment comes without one.
            OutOfRange: The version is too old.
            ResourceExhausted: The watcher is too slow, or there are too many.
        """
        if request.deployment and not request.namespace:
            raise InvalidArgument.of(
                "namespace", "is empty; a deployment is unique within its namespace only"
            )
        validation.check_namespace_filter(request.namespace)
        prefix = keys.events(request.namespace)
        with self._admitted():
            if request.resource_version:
                revision = _revision(request.resource_version)
                await self._require_kept(prefix, revision)
            else:
                kept, revision = await self._kept_events(prefix, request.deployment)
                for event in kept:
                    yield messages.WatchEventsResponse(event=event, resource_version=str(revision))
                yield messages.WatchEventsResponse(snapshot_end=True, resource_version=str(revision))
            if not request.follow:
                return
            buffer: Buffer[messages.WatchEventsResponse] = Buffer()
            seen = [revision]
            pump = asyncio.create_task(
                self._pump_events(prefix, request.deployment, seen, buffer), name="watch-events-pump"
            )
            try:
                async for message in self._follow(
                    buffer,
                    lambda: messages.WatchEventsResponse(progress=True, resource_version=str(seen[0])),
                ):
                    yield message
            finally:
                await cancel_and_wait(pump)

    def _changed(self, changed: frozenset[DeploymentId]) -> None:
        """Makes each change's message once and hands it to every watcher that wants it."""
        for identity in sorted(changed) if self._subscribers else ():
            interested = [buffer for buffer, wants in self._subscribers.items() if wants(identity)]
            if not interested:
                continue
            message = self._message(identity)
            for buffer in interested:
                buffer.put(message)

    def _message(self, identity: DeploymentId) -> messages.WatchDeploymentsResponse:
        version = str(self._context.view.revision)
        found = self._context.view.find_deployment(identity)
        if found is not None:
            return messages.WatchDeploymentsResponse(changed=found, resource_version=version)
        gone = deployment_pb2.Deployment(namespace=identity[0], name=identity[1])
        return messages.WatchDeploymentsResponse(deleted=gone, resource_version=version)

    def _snapshot(self, wanted: Callable[[DeploymentId], bool]) -> list[messages.WatchDeploymentsResponse]:
        """Every selected deployment as of now; changes after this moment are in the buffer."""
        known = (identity_of_key(key) for key in sorted(self._context.view.deployments.items))
        snapshot = [self._message(identity) for identity in known if wanted(identity)]
        snapshot.append(
            messages.WatchDeploymentsResponse(
                snapshot_end=True, resource_version=str(self._context.view.revision)
            )
        )
        return snapshot

    async def _since(
        self, revision: int, wanted: Callable[[DeploymentId], bool]
    ) -> Callable[[], list[messages.WatchDeploymentsResponse]]:
        """Asks the store what changed after a revision; the result makes the messages of that moment."""
        changed: set[DeploymentId] = set()
        present: set[DeploymentId] = set()
        for prefix in _DEPLOYMENT_PREFIXES:
            now = await self._list_keys(prefix, 0)
            if revision > now.revision:
                raise _version_unknown(revision)
            then = await self._list_keys(prefix, revision)
            after = {item.key for item in now.items if item.mod_revision > revision}
            gone = {item.key for item in then.items} - {item.key for item in now.items}
            changed |= {identity_of_key(key) for key in after | gone}
            if prefix == keys.SPEC_DEPLOYMENTS:
                present = {identity_of_key(item.key) for item in now.items}

        def build() -> list[messages.WatchDeploymentsResponse]:
            # A deployment that the view does not show yet is announced when it does.
            return [
                self._message(identity)
                for identity in sorted(changed)
                if wanted(identity)
                and (identity not in present or self._context.view.find_deployment(identity) is not None)
            ]

        return build

    async def _list_keys(self, prefix: str, revision: int) -> Page:
        try:
            return await self._context.store.list(prefix, revision=revision, keys_only=True)
        except Compacted as error:
            raise _version_unknown(revision) from error

    async def _require_kept(self, prefix: str, revision: int) -> None:
        """Refuses a version that the store no longer, or never, had."""
        current = await self._context.store.list(prefix, limit=1, keys_only=True)
        if revision > current.revision:
            raise _version_unknown(revision)

    async def _kept_events(self, prefix: str, deployment: str) -> tuple[Sequence[event_pb2.Event], int]:
        """Reads the kept events at one revision, oldest first."""
        kept: deque[event_pb2.Event] = deque(maxlen=limits.EVENTS_REPLAYED_MAX)
        start_after, revision = "", 0
        while True:
            page = await self._context.store.list(
                prefix, start_after=start_after, limit=_EVENTS_PAGE, revision=revision
            )
            kept.extend(event for item in page.items if (event := _event(item, deployment)) is not None)
            revision = page.revision
            if not page.more:
                break
            start_after = page.items[-1].key
        # Keys sort by namespace first; identifiers sort by time.
        return sorted(kept, key=lambda event: event.id), revision

    async def _pump_events(
        self, prefix: str, deployment: str, seen: list[int], buffer: Buffer[messages.WatchEventsResponse]
    ) -> None:
        """Moves events from the store into the buffer until the watch ends."""
        try:
            watch = self._context.store.watch(prefix, start_revision=seen[0] + 1)
            async with aclosing(watch) as batches:
                async for batch in batches:
                    for change in batch.events:
                        event = _event(change.value, deployment) if change.value is not None else None
                        if event is not None:
                            buffer.put(
                                messages.WatchEventsResponse(
                                    event=event, resource_version=str(batch.revision)
                                )
                            )
                    seen[0] = max(seen[0], batch.revision)
        except Compacted:
            buffer.fail(_version_unknown(seen[0]))
        except StoreError as error:
            buffer.fail(error)

    async def _follow(self, buffer: Buffer[T], progress: Callable[[], T]) -> AsyncGenerator[T, None]:
        """Yields what is buffered, and progress while there is nothing."""
        while True:
            try:
                yield await within(
                    self._context.clock, limits.PROGRESS_SECONDS, buffer.get(), name="watch-next"
                )
            except TimeoutError:
                yield progress()

    def _deployment_progress(self) -> messages.WatchDeploymentsResponse:
        return messages.WatchDeploymentsResponse(
            progress=True, resource_version=str(self._context.view.revision)
        )

    @contextmanager
    def _admitted(self) -> Iterator[None]:
        if self._open >= limits.WATCHERS_MAX:
            raise ResourceExhausted(
                f"{self._open} watches are open, which is the limit of this process; close some",
                metadata={"watchers_max": str(limits.WATCHERS_MAX)},
            )
        self._open += 1
        _watchers.inc()
        try:
            yield
        finally:
            self._open -= 1
            _watchers.dec()


def _selects(namespace: str, name: str) -> Callable[[DeploymentId], bool]:
    return lambda identity: (not namespace or identity[0] == namespace) and (not name or identity[1] == name)


def _event(item: KeyValue, deployment: str) -> event_pb2.Event | None:
    event = event_pb2.Event.FromString(item.value)
    return event if not deployment or event.deployment == deployment else None


def _revision(version: str) -> int:
    if not version.isascii() or not version.isdigit() or len(version) > 18 or int(version) < 1:
        raise InvalidArgument.of(
            "resource_version", f"`{version[:64]}` is none that this service gave out; begin without one"
        )
    return int(version)


def _version_unknown(revision: int) -> OutOfRange:
    return OutOfRange(
        f"resource version {revision} is no longer kept, or was never given out here; list again",
        metadata={"resource_version": str(revision)},
    )
