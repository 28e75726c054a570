"""Feeds the view from the store: six mirrors, one new view for a burst of changes.

In come the changes of `serve/endpoints`, `serve/deployments`, `spec/keys`, `spec/deployments`,
`spec/namespaces` and `stats`; out come new `View` objects and samples in the table. Changes of one pass of
the event loop make one view. While the store is away the last view stands, without limit; `age_seconds` says
since when. It writes nothing.
"""

import asyncio
from collections.abc import Callable
from contextlib import suppress

import structlog
from millrace.core.v1 import endpoint_pb2, stats_pb2
from millrace.state.v1 import records_pb2

from core.clock import Clock
from core.store import Store, StoreUnavailable, keys
from core.store.mirror import Mirror
from router.view.samples import Sample, SampleTable
from router.view.view import Endpoint, View, build_view

_log = structlog.get_logger(__name__)

# Only how long one look at an absent store lasts; it is looked at again.
_SYNC_WAIT_SECONDS = 5.0

Listener = Callable[[View], None]
SampleListener = Callable[[Endpoint, Sample], None]


class ViewSource:
    """Holds the current view and replaces it.

    Attributes:
        samples: Latest statistics.
    """

    def __init__(
        self,
        store: Store,
        clock: Clock,
        *,
        take_in_flight_peak: Callable[[str], int],
    ) -> None:
        """Prepares the mirrors; nothing is read before `run`.

        Args:
            store: Where the records are.
            clock: Measures ages.
            take_in_flight_peak: Tells the most requests that this process had at a replica since it was
                asked last.
        """
        self.samples = SampleTable(clock)
        self._take_in_flight_peak = take_in_flight_peak
        self._view = View()
        self._listeners: list[Listener] = []
        self._sample_listeners: list[SampleListener] = []
        self._by_replica: dict[str, Endpoint] = {}
        self._changed: asyncio.Event = asyncio.Event()
        self._dirty = asyncio.Event()
        self._endpoints = Mirror(
            store,
            keys.SERVE_ENDPOINTS,
            endpoint_pb2.Endpoint.FromString,
            name="serve/endpoints",
            clock=clock,
        )
        self._api_keys = Mirror(
            store, keys.SPEC_KEYS, records_pb2.ApiKeyRecord.FromString, name="spec/keys", clock=clock
        )
        self._deployments = Mirror(
            store,
            keys.SPEC_DEPLOYMENTS,
            records_pb2.DeploymentRecord.FromString,
            name="spec/deployments",
            clock=clock,
        )
        self._namespaces = Mirror(
            store,
            keys.SPEC_NAMESPACES,
            records_pb2.NamespaceRecord.FromString,
            name="spec/namespaces",
            clock=clock,
        )
        self._served = Mirror(
            store,
            keys.SERVE_DEPLOYMENTS,
            records_pb2.ServedDeploymentRecord.FromString,
            name="serve/deployments",
            clock=clock,
        )
        self._spec = (self._endpoints, self._api_keys, self._deployments, self._namespaces, self._served)
        self._stats = Mirror(store, keys.STATS, stats_pb2.EngineStats.FromString, name="stats", clock=clock)
        for mirror in self._spec:
            mirror.subscribe(self._mark_dirty)
        self._stats.subscribe(self._take_samples)

    @property
    def view(self) -> View:
        """The present view."""
        return self._view

    def age_seconds(self) -> float:
        """Returns the time since the store was last heard, by the mirror that has waited longest.

        Infinite before all have been read once.
        """
        return max(mirror.age_seconds() for mirror in self._spec)

    def subscribe(self, listener: Listener) -> None:
        """Has a function called on the event loop with every new view; it must not block."""
        self._listeners.append(listener)

    def subscribe_samples(self, listener: SampleListener) -> None:
        """Has a function called on the event loop with every fresh sample; it must not block."""
        self._sample_listeners.append(listener)

    async def wait_changed(self, version: int, timeout_seconds: float) -> View:
        """Returns the first view newer than `version`, or the present one when the time is over."""
        try:
            async with asyncio.timeout(timeout_seconds):
                while self._view.version <= version:
                    await self._changed.wait()
        except TimeoutError:
            pass
        return self._view

    async def run(self) -> None:
        """Keeps the view up to date, for ever."""
        async with asyncio.TaskGroup() as group:
            for mirror in (*self._spec, self._stats):
                group.create_task(mirror.run(), name=f"mirror-{mirror.name}")
            group.create_task(self._rebuild_forever(), name="view-rebuild")

    async def _rebuild_forever(self) -> None:
        # The mirrors log what keeps them from the store; there is nothing to add but patience.
        while not all(mirror.synced for mirror in self._spec):
            for mirror in self._spec:
                with suppress(StoreUnavailable):
                    await mirror.wait_synced(_SYNC_WAIT_SECONDS)
        self._rebuild()
        _log.info("view synced", endpoints=len(self._view.endpoints), keys=len(self._view.api_keys))
        while True:
            await self._dirty.wait()
            self._rebuild()

    def _mark_dirty(self, _changed: frozenset[str]) -> None:
        self._dirty.set()

    def _rebuild(self) -> None:
        self._dirty.clear()
        self._view = build_view(
            version=self._view.version + 1,
            endpoints=self._endpoints.items.values(),
            api_keys=self._api_keys.items,
            deployments=self._deployments.items.values(),
            namespaces=self._namespaces.items.values(),
            served=self._served.items.values(),
        )
        self._by_replica = {each.replica: each for each in self._view.endpoints}
        for listener in self._listeners:
            listener(self._view)
        self._changed.set()
        self._changed = asyncio.Event()

    def _take_samples(self, changed: frozenset[str]) -> None:
        gone = False
        for key in changed:
            stats = self._stats.get(key)
            if stats is None:
                gone = True
                continue
            self.samples.record(stats, own_in_flight=self._take_in_flight_peak(stats.replica))
            self._tell_sample(stats.replica)
        if gone:
            self.samples.retain(stats.replica for stats in self._stats.items.values())

    def _tell_sample(self, replica: str) -> None:
        endpoint = self._by_replica.get(replica)
        sample = None if endpoint is None else self.samples.fresh(replica, endpoint.incarnation)
        if endpoint is None or sample is None:
            return
        for listener in self._sample_listeners:
            listener(endpoint, sample)
