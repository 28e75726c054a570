"""Named, owned and awaited asyncio tasks.

`run_services` is the composition root of a process: it runs long-lived coroutines side by side, stops
all of them when one ends or a signal comes, and waits for every one. Nothing here restarts anything: a
loop that should survive errors handles them itself and says so in its log.
"""

import asyncio
import signal
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from contextlib import suppress
from typing import Any

import structlog

_log = structlog.get_logger(__name__)

# A second signal within the stop period ends the process without waiting further.
STOP_SECONDS = 20.0


async def cancel_and_wait(*tasks: "asyncio.Task[Any] | None") -> None:
    """Cancels tasks and waits until each has ended; their errors are logged, not raised."""
    present = [task for task in tasks if task is not None]
    for task in present:
        task.cancel()
    for outcome, task in zip(await asyncio.gather(*present, return_exceptions=True), present, strict=True):
        if isinstance(outcome, Exception):
            _log.error("task failed while stopping", task=task.get_name(), error=repr(outcome))


async def run_services(
    services: Mapping[str, Coroutine[Any, Any, None]],
    *,
    stop: asyncio.Event,
    on_stop: Callable[[], Awaitable[None]] | None = None,
) -> None:
    """Runs services until `stop` is set or one of them ends.

    Args:
        services: Name to coroutine. Each is expected to run for ever.
        stop: Set by a signal handler.
        on_stop: Called once before the services are cancelled, to drain.

    Raises:
        BaseException: What the service that ended first raised.
        RuntimeError: A service returned although nothing asked it to.
    """
    tasks = [asyncio.create_task(body, name=name) for name, body in services.items()]
    stopper = asyncio.create_task(stop.wait(), name="stop-signal")
    try:
        done, _ = await asyncio.wait([*tasks, stopper], return_when=asyncio.FIRST_COMPLETED)
        if stopper not in done and not stop.is_set():
            ended = next(iter(done))
            error = ended.exception()
            _log.error("service ended", service=ended.get_name(), error=repr(error))
            if error is not None:
                raise error
            raise RuntimeError(f"service {ended.get_name()} ended although nothing asked it to")
        if on_stop is not None:
            with suppress(TimeoutError):
                async with asyncio.timeout(STOP_SECONDS):
                    await on_stop()
    finally:
        await cancel_and_wait(*tasks, stopper)


def stop_on_signals() -> asyncio.Event:
    """Returns an event that SIGINT and SIGTERM set; a second signal ends the process at once."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()

    def handle(number: signal.Signals) -> None:
        if stop.is_set():
            loop.remove_signal_handler(number)
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        stop.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, handle, number)
    return stop
