"""Scrapes engines and devices, and keeps the latest sample of each.

Scraping goes on without a control plane: health checks use the freshness of the samples. A slow engine
delays nobody, since every engine has a scrape of its own and at most one at a time.
"""

import asyncio
import math
from collections.abc import Callable, Iterable

import structlog
from millrace.core.v1 import stats_pb2

from core.clock import Clock
from core.tasks import cancel_and_wait
from nodeagent.engines.registry import EngineAdapters
from nodeagent.health import EngineProbe
from nodeagent.inventory import Inventory
from nodeagent.replica import Replica

_log = structlog.get_logger(__name__)

# Until the control plane says otherwise.
PERIOD_SECONDS = 1.0
# Reading devices through vendors' libraries takes longer and changes slower than engines do.
DEVICE_PERIOD_SECONDS = 5.0
# A vendor's library that hangs must not pass old utilisation off as new.
_DEVICE_STALE_SECONDS = 3 * DEVICE_PERIOD_SECONDS


class StatsCollector:
    """Holds the latest samples.

    Attributes:
        period_seconds: Time between scrapes; the session sets it.
        failures_total: Scrapes that failed since the agent started.
    """

    def __init__(
        self,
        *,
        replicas: Callable[[], Iterable[Replica]],
        adapters: EngineAdapters,
        probe: EngineProbe,
        inventory: Inventory,
        clock: Clock,
    ) -> None:
        """Takes where to find what is scraped; `run` does the work."""
        self._replicas = replicas
        self._adapters = adapters
        self._probe = probe
        self._inventory = inventory
        self._clock = clock
        self._scrapes: dict[str, asyncio.Task[None]] = {}
        self._devices: list[stats_pb2.DeviceStats] = []
        self._devices_at = -math.inf
        self.period_seconds = PERIOD_SECONDS
        self.failures_total = 0

    async def run(self) -> None:
        """Scrapes until cancelled."""
        devices = asyncio.create_task(self._run_devices(), name="device-stats")
        try:
            while True:
                for replica in list(self._replicas()):
                    self._begin(replica)
                await self._clock.sleep(self.period_seconds)
        finally:
            await cancel_and_wait(devices, *self._scrapes.values())

    def engine_samples(self) -> list[stats_pb2.EngineStats]:
        """Returns the latest sample of each engine that serves and answered lately."""
        now = self._clock.monotonic()
        # A sample that missed a few periods is old news: the reader must see it age, not repeat.
        oldest = now - 3 * self.period_seconds - 1.0
        return [
            replica.samples.latest
            for replica in self._replicas()
            if replica.serving
            and replica.samples.latest is not None
            and (replica.samples.latest_at or 0.0) >= oldest
        ]

    def device_samples(self) -> list[stats_pb2.DeviceStats]:
        """Returns the latest sample of each device."""
        return list(self._devices)

    def _begin(self, replica: Replica) -> None:
        if not replica.serving or replica.name in self._scrapes:
            return
        task = asyncio.create_task(self._scrape(replica), name=f"scrape-{replica.name}")
        self._scrapes[replica.name] = task
        task.add_done_callback(lambda _: self._scrapes.pop(replica.name, None))

    async def _scrape(self, replica: Replica) -> None:
        outcome, page = await self._probe.metrics(replica.observation.url)
        if not outcome.ok:
            if not (outcome.absent and replica.external):
                self.failures_total += 1
            _log.debug("no metrics", replica=replica.name, reason=outcome.reason)
            return
        sample = self._adapters[replica.assignment.launch.engine].parse_metrics(page)
        utilization = self._utilization_ratio(replica)
        if utilization is not None:
            sample.device_utilization_ratio = utilization
        replica.take_sample(sample, self._clock)

    def _utilization_ratio(self, replica: Replica) -> float | None:
        """Returns the mean of the replica's devices; None unless all of them were sampled lately."""
        if self._clock.monotonic() - self._devices_at > _DEVICE_STALE_SECONDS:
            return None
        known = {
            each.device_id: each.utilization_ratio
            for each in self._devices
            if each.HasField("utilization_ratio")
        }
        ratios = [known.get(claim.device_id) for claim in replica.assignment.devices]
        told = [each for each in ratios if each is not None]
        return sum(told) / len(told) if told and len(told) == len(ratios) else None

    async def _run_devices(self) -> None:
        while True:
            self._devices = await asyncio.to_thread(self._inventory.sample)
            self._devices_at = self._clock.monotonic()
            await self._clock.sleep(DEVICE_PERIOD_SECONDS)
