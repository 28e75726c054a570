"""Entry point of `millrace-router`.

In comes a command line, out goes an exit code: 0 after a clean stop, 1 when the port is taken or a
service failed, 2 for a wrong option. With several workers this process supervises them; otherwise it
is the worker.
"""

import asyncio
import gc
import os
import resource
import socket
import sys
from collections.abc import Coroutine, Sequence
from typing import Any

import structlog

from core.clock import SystemClock
from core.errors import InvalidArgument
from core.logging import configure
from core.settings import event_loop_runner, give_up, read_settings, read_token
from core.store.etcd import EtcdStore
from core.tasks import cancel_and_wait, stop_on_signals
from router.picking.contract import Strategy
from router.picking.registry import build_strategy
from router.server import PortTaken, bind, inherit, serve
from router.settings import RouterSettings
from router.supervisor import WORKER_VARIABLE, Supervisor

_log = structlog.get_logger(__name__)

_PROGRAM = "millrace-router"

# Objects between two collections of the young: some hundred requests' worth, a few megabytes.
_YOUNG_OBJECTS_MAX = 50_000


def main() -> None:
    """Runs the router and exits."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Runs the router.

    Args:
        arguments: Command line without the program's name.

    Returns:
        Exit code.
    """
    settings = read_settings(RouterSettings, arguments)
    try:
        strategy = build_strategy(settings.strategy)
    except InvalidArgument as error:
        give_up(_PROGRAM, 2, f"--{error.message}")
    admin_token = read_token(settings.admin_token_file) if settings.admin_token_file else ""
    agent_token = read_token(settings.agent_token_file) if settings.agent_token_file else ""
    configure(service="router", level=settings.log_level, style=settings.log_style)
    inherited = os.environ.get(WORKER_VARIABLE)
    try:
        if settings.listen_fd is not None:
            listener = inherit(settings.listen_fd)
        elif inherited is not None:
            listener = bind(settings.host, int(inherited), shared=True)
        else:
            listener = _claim(settings)
    except PortTaken as error:
        give_up(_PROGRAM, 1, str(error))
    _raise_file_limit()
    _spare_collections()
    with listener:
        if inherited is None and settings.workers > 1:
            return _run(_supervise(settings, list(arguments), listener))
        supervised = inherited is not None
        return _run(_work(settings, strategy, listener, admin_token, agent_token, supervised=supervised))


def _claim(settings: RouterSettings) -> socket.socket:
    """Takes the port for good; a port that is shared already belongs to another router."""
    exclusive = bind(settings.host, settings.port, shared=False)
    if settings.workers == 1:
        return exclusive
    port = exclusive.getsockname()[1]
    exclusive.close()
    return bind(settings.host, port, shared=True)


async def _work(
    settings: RouterSettings,
    strategy: Strategy,
    listener: socket.socket,
    admin_token: str,
    agent_token: str,
    *,
    supervised: bool,
) -> None:
    stop = stop_on_signals()
    orphan = asyncio.create_task(_stop_with_parent(stop), name="parent-watch") if supervised else None
    try:
        await serve(
            settings,
            listener=listener,
            store=EtcdStore(settings.etcd()),
            strategy=strategy,
            clock=SystemClock(),
            stop=stop,
            admin_token=admin_token,
            agent_token=agent_token,
        )
    finally:
        await cancel_and_wait(orphan)


async def _stop_with_parent(stop: asyncio.Event) -> None:
    """Stops the worker when the supervisor has died: its end of our standard input closes."""
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), sys.stdin
    )
    await reader.read()
    if not stop.is_set():
        _log.warning("supervisor is gone, stopping")
    stop.set()


async def _supervise(settings: RouterSettings, arguments: list[str], listener: socket.socket) -> None:
    supervisor = Supervisor(
        workers=settings.workers,
        arguments=arguments,
        port=listener.getsockname()[1],
        inherited_descriptors=() if settings.listen_fd is None else (settings.listen_fd,),
        drain_seconds=settings.drain_seconds,
        clock=SystemClock(),
    )
    await supervisor.run(stop_on_signals())


def _raise_file_limit() -> None:
    """Takes as many sockets as the system grants: a request needs two, and many defaults are 1024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _spare_collections() -> None:
    """Has the collector of cycles look seldom, and never at what stays: it took an eighth of a request.

    Requests leave no cycles behind, but they leave decisions and streams that are alive, which the collector
    would go through again and again. A full collection still comes when what is alive has grown by a quarter.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(_YOUNG_OBJECTS_MAX, 20, 20)


def _run(body: Coroutine[Any, Any, None]) -> int:
    try:
        with event_loop_runner() as runner:
            runner.run(body)
    except Exception:  # noqa: BLE001 - the last line of a process: whatever ended it is logged, with its trace
        _log.exception("router failed")
        return 1
    return 0


if __name__ == "__main__":
    main()
