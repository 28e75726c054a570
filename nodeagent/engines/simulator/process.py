"""The life of one simulator process: start, serve, drain, exit.

In: settings and signals. Out: an exit code, and the few lines vLLM would write at the same points.
SIGTERM or SIGINT closes the port, lets running requests end within the shutdown timeout, and
exits with 0; a dead engine exits with 1 after a short while in which /health answers 503.
Must not: know routes or the engine's inside.
"""

import asyncio
import signal
import sys
import time

from nodeagent.engines.simulator.api import SimulatorApi
from nodeagent.engines.simulator.engine_driver import EngineDriver
from nodeagent.engines.simulator.engine_model import EngineModel
from nodeagent.engines.simulator.faults import Faults
from nodeagent.engines.simulator.http_server import HttpServer
from nodeagent.engines.simulator.metrics import EngineMetrics
from nodeagent.engines.simulator.settings import SimulatorSettings


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


class SimulatorProcess:
    """One simulator, from settings to exit code."""

    def __init__(self, settings: SimulatorSettings) -> None:
        self._settings = settings
        self._stop = asyncio.Event()
        self._engine_died = False
        metrics = EngineMetrics(settings, time.time())
        model = EngineModel(settings.limits, settings.timing)
        self._driver = EngineDriver(model, metrics, self._engine_death)
        self._api = SimulatorApi(settings, self._driver, metrics, Faults(settings.faults))
        self._server = HttpServer(self._api.handle)

    def _engine_death(self) -> None:
        self._engine_died = True
        self._stop.set()

    async def run(self) -> int:
        """Serves until a signal or the engine's death; returns the exit code.

        Raises:
            OSError: The address cannot be bound.
        """
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop.set)
        if not await self._start_up():
            return 0
        port = await self._server.start(self._settings.host, self._settings.port)
        _say(f"INFO:     Started server process, listening on http://{self._settings.host}:{port}")
        _say("INFO:     Application startup complete.")
        await self._stop.wait()
        if self._engine_died:
            _say("ERROR:    engine died, shutting down")
            await asyncio.sleep(self._settings.faults.death_linger_seconds)
        else:
            await self._drain()
        await self._server.close()
        await self._driver.close()
        return 1 if self._engine_died else 0

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
        self._api.draining = True
        self._server.stop_accepting()
        try:
            async with asyncio.timeout(self._settings.shutdown_timeout_seconds):
                await self._server.wait_until_idle()
        except TimeoutError:
            _say("INFO:     Shutdown timeout reached, aborting running requests.")
