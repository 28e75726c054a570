"""The parent of several workers: starts them, restarts the dead, stops them together.

In come the number of workers and the command line of one; they share the port by SO_REUSEPORT, or one
socket that the parent itself has inherited. The
parent serves nothing. It holds the port bound, so that nobody takes it between two lives of a worker,
and one end of a pipe to each worker: a worker whose parent is gone reads its end and drains.
"""

import asyncio
import os
import sys
import tempfile
from asyncio.subprocess import PIPE, Process
from contextlib import suppress

import structlog
from prometheus_client import multiprocess

from core.backoff import Backoff, BackoffPolicy
from core.clock import Clock
from core.tasks import cancel_and_wait
from router.metrics import MULTIPROCESS_VARIABLE

_log = structlog.get_logger(__name__)

# Set for workers; its value is the port that the parent holds.
WORKER_VARIABLE = "MILLRACE_ROUTER_WORKER_PORT"

# A worker that dies at once must not keep a core busy with starting.
_RESTART = BackoffPolicy(initial_seconds=0.1, maximum_seconds=10.0)
# A worker that lived longer than this did not die of its start.
_HEALTHY_SECONDS = 10.0
# Beyond the drain period a worker is not ending any more.
_KILL_MARGIN_SECONDS = 5.0


class Supervisor:
    """Keeps a number of workers running."""

    def __init__(
        self,
        *,
        workers: int,
        arguments: list[str],
        port: int,
        drain_seconds: float,
        clock: Clock,
        inherited_descriptors: tuple[int, ...] = (),
    ) -> None:
        """Takes a worker's command line (without the interpreter), the shared port and what to pass on."""
        self._workers = workers
        self._arguments = arguments
        self._port = port
        self._drain_seconds = drain_seconds
        self._clock = clock
        self._inherited_descriptors = inherited_descriptors

    async def run(self, stop: asyncio.Event) -> None:
        """Supervises until `stop` is set, then ends every worker and waits for it."""
        with tempfile.TemporaryDirectory(prefix="millrace-router-metrics-") as metrics_directory:
            environment = {
                **os.environ,
                WORKER_VARIABLE: str(self._port),
                MULTIPROCESS_VARIABLE: metrics_directory,
            }
            keepers = [
                asyncio.create_task(
                    self._keep(index, environment, metrics_directory, stop), name=f"worker-{index}"
                )
                for index in range(self._workers)
            ]
            try:
                await asyncio.gather(*keepers)
            finally:
                await cancel_and_wait(*keepers)

    async def _keep(
        self, index: int, environment: dict[str, str], metrics_directory: str, stop: asyncio.Event
    ) -> None:
        backoff = Backoff(_RESTART)
        stopping = asyncio.create_task(stop.wait(), name=f"worker-{index}-stop")
        try:
            while not stop.is_set():
                started = self._clock.monotonic()
                process = await asyncio.create_subprocess_exec(
                    sys.executable,
                    "-m",
                    "router",
                    *self._arguments,
                    stdin=PIPE,
                    env=environment,
                    pass_fds=self._inherited_descriptors,
                )
                _log.info("worker started", worker=index, pid=process.pid)
                await self._watch(index, process, stopping)
                multiprocess.mark_process_dead(process.pid, path=metrics_directory)  # type: ignore[no-untyped-call]
                if stop.is_set():
                    return
                if self._clock.monotonic() - started > _HEALTHY_SECONDS:
                    backoff.succeeded()
                wait = backoff.failed()
                _log.error(
                    "worker died, starting another",
                    worker=index,
                    pid=process.pid,
                    exit_code=process.returncode,
                    wait_seconds=round(wait, 3),
                )
                with suppress(TimeoutError):
                    async with asyncio.timeout(wait):
                        await asyncio.shield(stopping)
        finally:
            await cancel_and_wait(stopping)

    async def _watch(self, index: int, process: Process, stopping: "asyncio.Task[bool]") -> None:
        """Waits until a worker has ended, by itself or because it was told to."""
        ended = asyncio.create_task(process.wait(), name=f"worker-{index}-wait")
        try:
            await asyncio.wait({ended, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if not ended.done():
                process.terminate()
                await asyncio.wait({ended}, timeout=self._drain_seconds + _KILL_MARGIN_SECONDS)
            if not ended.done():
                _log.error("worker does not end, killed", worker=index, pid=process.pid)
        finally:
            if process.returncode is None:
                with suppress(ProcessLookupError):
                    process.kill()
            await process.wait()
            await cancel_and_wait(ended)
