"""One simulated engine as its HTTP front sees it: ranks, admission, sleep, adapters, cache events.

In: requests, and orders of the development and adapter routes. Out: token streams, refusals, the
metrics of all ranks. Each data-parallel rank has a batch, a cache and an event publisher of its own;
a request that names no rank goes to the one with the fewest requests, those that wait counted four
times, as in vLLM.
Must not: know HTTP.
"""

import time
from collections.abc import Callable
from typing import Any

from nodeagent.engines.simulator.engine_driver import EngineDriver, TokenStream
from nodeagent.engines.simulator.engine_model import EngineModel, SequenceRequest
from nodeagent.engines.simulator.kv_journal import KvEvent
from nodeagent.engines.simulator.metrics import EngineMetrics, SharedMetrics, render_metrics
from nodeagent.engines.simulator.settings import LoraAdapter, SimulatorSettings

_WAITING_WEIGHT = 4


class QueueFullError(Exception):
    """The engine takes no more requests; `reason` is the label of the rejection's counter."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class SimulatedEngine:
    """All ranks of one engine.

    Attributes:
        drivers: One step loop a rank.
        adapters: LoRA adapters by name.
        sleep_level: 1 or 2 while it sleeps, 0 while only its scheduler is paused, None while awake.
    """

    def __init__(
        self, settings: SimulatorSettings, *, index: int = 0, on_death: Callable[[], object] = lambda: None
    ) -> None:
        """Builds the ranks; nothing is opened before `open_kv_events`.

        Args:
            settings: What the process was told.
            index: Number of the engine in its fleet; shifts the endpoints of its events.
            on_death: Called once when the engine dies.
        """
        self._settings = settings
        self._index = index
        self._on_death = on_death
        self._died = False
        shared = SharedMetrics(settings, time.time())
        self._metrics: list[EngineMetrics] = []
        self.drivers: list[EngineDriver] = []
        self._sources: dict[str, dict[str, Any]] = {}
        self._close_publishers: list[Callable[[], None]] = []
        for rank in range(settings.data_parallel_size):
            metrics = EngineMetrics(settings, shared.created_seconds, rank=rank, shared=shared)
            model = EngineModel(settings.limits, settings.timing)
            self._metrics.append(metrics)
            self.drivers.append(EngineDriver(model, metrics, self.kill))
        self.adapters = {adapter.name: adapter for adapter in settings.lora_adapters}
        self._adapter_number = len(self.adapters)
        self.sleep_level: int | None = None

    def open_kv_events(self) -> None:
        """Opens the event sockets where events are asked for; call within the running loop.

        Raises:
            OSError: An endpoint cannot be bound.
        """
        if self._settings.kv_events is None:
            return
        # Costs 60 ms to import, which an engine without events does not pay.
        from nodeagent.engines.simulator.kv_publisher import KvEventPublisher

        for rank, driver in enumerate(self.drivers):
            offset = self._index * self._settings.data_parallel_size + rank
            publisher = KvEventPublisher(self._settings.kv_events, rank=rank, offset=offset)
            self._close_publishers.append(publisher.close)
            self._sources[str(rank)] = publisher.source()
            driver.publish = _timed(publisher.publish)

    # --- requests ---------------------------------------------------------------------------------

    @property
    def dead(self) -> bool:
        """Whether the engine has died."""
        return self._died

    @property
    def active_requests(self) -> int:
        """Requests that have not ended."""
        return sum(driver.active_requests for driver in self.drivers)

    def check_admission(self) -> None:
        """Refuses a request that the queue limits leave no room for.

        Raises:
            QueueFullError: A limit is reached.
        """
        settings = self._settings
        reason = None
        if settings.max_queued_requests is not None and self.active_requests >= settings.max_queued_requests:
            reason = "max_num_queued_reqs"
        elif settings.max_queued_tokens is not None:
            queued = sum(driver.model.unprocessed_prompt_tokens for driver in self.drivers)
            if queued >= settings.max_queued_tokens:
                reason = "max_num_queued_tokens"
        if reason is not None:
            self._metrics[0].shared.record_rejection(reason)
            raise QueueFullError(reason)

    def submit(self, request: SequenceRequest, rank: int | None = None) -> TokenStream:
        """Queues a request at a rank, or at the least loaded one.

        Raises:
            EngineDeadError: The engine is dead.
            ValueError: The request does not fit into the model's length.
        """
        driver = self.drivers[rank] if rank is not None else min(self.drivers, key=_load)
        return driver.submit(request)

    def abort(self, stream: TokenStream) -> None:
        """Forgets a request whose reader has left; harmless after its end."""
        for driver in self.drivers:
            driver.abort(stream)

    def kill(self) -> None:
        """Ends every stream as a dying engine would; nothing is served afterwards."""
        if self._died:
            return
        self._died = True
        for driver in self.drivers:
            driver.kill()
        self._on_death()

    async def close(self) -> None:
        """Stops the step loops and closes the event sockets."""
        self._died = True
        for driver in self.drivers:
            await driver.close()
        for close in self._close_publishers:
            close()
        self._close_publishers.clear()

    # --- what the other routes show and order -------------------------------------------------------

    def metrics_text(self) -> bytes:
        """The text of GET /metrics."""
        return render_metrics(self._metrics)

    def kv_event_sources(self) -> dict[str, dict[str, Any]]:
        """Rank to its publisher's resolved settings; empty without events."""
        return self._sources

    def reset_prefix_cache(self) -> bool:
        """Forgets all cached blocks of every rank; False where a rank still uses some."""
        cleared = [driver.model.clear_cache() for driver in self.drivers]
        return all(cleared)

    def sleep(self, level: int, mode: str) -> None:
        """Stops computing: `mode` abort ends what runs, keep freezes it.

        Requests that come hang until the engine is woken, and `/health` stays well. From level 1 on
        the cache is lost.
        """
        self.sleep_level = level
        for driver, metrics in zip(self.drivers, self._metrics, strict=True):
            if mode == "abort":
                driver.abort_all()
            driver.pause()
            if level >= 1:
                driver.model.clear_cache()
                metrics.record_sleep(level)

    def wake_up(self) -> None:
        """Goes on computing."""
        self.sleep_level = None
        for driver, metrics in zip(self.drivers, self._metrics, strict=True):
            metrics.record_sleep(None)
            driver.resume()

    def load_adapter(self, name: str, path: str) -> None:
        """Makes an adapter usable; one that is loaded already keeps its number."""
        known = self.adapters.get(name)
        if known is None:
            self._adapter_number += 1
        number = known.number if known is not None else self._adapter_number
        self.adapters[name] = LoraAdapter(name, path, number)


def _load(driver: EngineDriver) -> int:
    return _WAITING_WEIGHT * driver.model.waiting_count + driver.model.running_count


def _timed(publish: Callable[[list[KvEvent], float], None]) -> Callable[[list[KvEvent]], None]:
    return lambda events: publish(events, time.time())
