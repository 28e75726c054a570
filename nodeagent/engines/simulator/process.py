"""The life of one simulator process: start, serve, drain, exit.

In: settings and signals. Out: an exit code, and the few lines vLLM would write at the same points.
SIGTERM or SIGINT lets running requests end within the shutdown timeout, refuses new ones meanwhile,
and exits with 0. A dead engine answers 503 to /health for a short while and then closes its port; the
process exits with 1 once the last engine of its fleet is dead.
Must not: know routes or the engine's inside.
"""

import asyncio
import signal
import sys

from nodeagent.engines.simulator.api import SimulatorApi
from nodeagent.engines.simulator.engine import SimulatedEngine
from nodeagent.engines.simulator.faults import Faults, leak
from nodeagent.engines.simulator.http_server import HttpServer
from nodeagent.engines.simulator.settings import SimulatorSettings


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


class _Unit:
    """One engine of the fleet with its front."""

    def __init__(self, settings: SimulatorSettings, index: int) -> None:
        self.died = asyncio.Event()
        self.engine = SimulatedEngine(settings, index=index, on_death=self.died.set)
        self.api = SimulatorApi(settings, self.engine, Faults(settings.faults))
        self.server = HttpServer(self.api.handle)

    async def close(self) -> None:
        await self.server.close()
        await self.engine.close()


class SimulatorProcess:
    """One simulator, from settings to exit code."""

    def __init__(self, settings: SimulatorSettings) -> None:
        self._settings = settings
        self._stop = asyncio.Event()
        self._units = [_Unit(settings, index) for index in range(settings.fleet_size)]

    async def run(self) -> int:
        """Serves until a signal or the death of the last engine; returns the exit code.

        Raises:
            OSError: An address cannot be bound.
        """
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop.set)
        if not await self._start_up():
            return 0
        try:
            return await self._serve()
        finally:
            for unit in self._units:
                await unit.close()

    async def _serve(self) -> int:
        settings = self._settings
        for index, unit in enumerate(self._units):
            unit.engine.open_kv_events()
            port = await unit.server.start(settings.host, settings.port + index if settings.port else 0)
            _say(f"INFO:     Started server process, listening on http://{settings.host}:{port}")
        _say("INFO:     Application startup complete.")
        burials = [
            asyncio.create_task(self._bury(unit), name=f"simulator burial {index}")
            for index, unit in enumerate(self._units)
        ]
        stopped = asyncio.create_task(self._stop.wait(), name="simulator stop")
        leaking = asyncio.create_task(self._leak(), name="simulator leak")
        try:
            pending: set[asyncio.Task[None]] = set(burials)
            while pending and not self._stop.is_set():
                done, _ = await asyncio.wait({*pending, stopped}, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    task.result()
                pending -= done
        finally:
            for task in (*burials, stopped, leaking):
                task.cancel()
            await asyncio.wait({*burials, stopped, leaking})
        if not pending:
            return 1
        await self._drain()
        return 0

    async def _leak(self) -> None:
        if self._settings.faults.leak_mebibytes_per_second > 0:
            await leak(self._settings.faults)

    async def _bury(self, unit: _Unit) -> None:
        """Waits for an engine's death and closes its front a while later."""
        await unit.died.wait()
        _say("ERROR:    engine died, shutting down")
        await asyncio.sleep(self._settings.faults.death_linger_seconds)
        await unit.close()

    async def _start_up(self) -> bool:
        """Waits as long as a model would take to load; False if told to stop meanwhile."""
        if self._settings.startup_seconds == 0:
            return True
        try:
            await asyncio.wait_for(self._stop.wait(), self._settings.startup_seconds)
        except TimeoutError:
            return True
        return False

    async def _drain(self) -> None:
        # As in vLLM the ports stay open meanwhile: /health is well, new requests get 500.
        for unit in self._units:
            unit.api.draining = True
        try:
            async with asyncio.timeout(self._settings.shutdown_timeout_seconds):
                for unit in self._units:
                    await unit.server.wait_until_idle()
        except TimeoutError:
            _say("INFO:     Shutdown timeout reached, aborting running requests.")
