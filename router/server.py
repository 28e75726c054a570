"""Runs one router worker on a listening socket until it is told to stop.

In come settings and a bound socket; requests are served until `stop` is set. Then nothing new is
accepted, requests in flight end within the drain period, and everything is closed.
"""

import asyncio
import errno
import socket

import structlog
from aiohttp import web

from core.clock import Clock
from core.store import Store
from core.tasks import run_services
from router.app import RouterApplication
from router.picking.contract import Strategy
from router.presence import announce, new_router_id
from router.settings import RouterSettings

_log = structlog.get_logger(__name__)

# After the drain period: what is left gets this long to write its last bytes.
CLOSE_SECONDS = 1.0
# Connections that wait to be accepted; a burst larger than this is refused by the kernel.
BACKLOG = 1024
# With the store away, a router says so on /health after this, instead of not answering at all.
START_VIEW_SECONDS = 5.0


class PortTaken(Exception):
    """The address cannot be listened on; the message names port and option."""


def bind(host: str, port: int, *, shared: bool) -> socket.socket:
    """Binds the listening socket.

    Args:
        host: Address.
        port: Port; 0 takes a free one.
        shared: Let other processes of ours listen on the same port.

    Raises:
        PortTaken: Someone else has it, or the address is not this machine's.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
    except OSError as error:
        raise PortTaken(f"cannot listen on {host} (option --host): {error}") from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if shared:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise PortTaken(f"port {port} on {host} is taken: choose another with --port") from error
        raise PortTaken(
            f"cannot listen on port {port} of {host} (options --host, --port): {error.strerror}"
        ) from error
    listener.setblocking(False)
    return listener


def inherit(descriptor: int) -> socket.socket:
    """Takes a listening socket that the parent made.

    Raises:
        PortTaken: The descriptor is no listening TCP socket.
    """
    try:
        listener = socket.socket(fileno=descriptor)
        listening = listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    except OSError as error:
        raise PortTaken(f"--listen-fd {descriptor} is no socket: {error.strerror}") from error
    if not listening or listener.type != socket.SOCK_STREAM:
        listener.close()
        raise PortTaken(f"--listen-fd {descriptor} does not listen: the parent must listen on it first")
    listener.setblocking(False)
    return listener


def public_url(settings: RouterSettings, port: int) -> str:
    """Returns the base URL that clients use, without `/v1`."""
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    return settings.public_url.rstrip("/") or f"http://{host}:{port}"


async def serve(
    settings: RouterSettings,
    *,
    listener: socket.socket,
    store: Store,
    strategy: Strategy,
    clock: Clock,
    stop: asyncio.Event,
    admin_token: str = "",
    agent_token: str = "",
) -> None:
    """Serves until `stop` is set, then drains.

    Args:
        settings: Options.
        listener: Bound socket; closed at the end.
        store: Where the view comes from.
        strategy: How endpoints are picked.
        clock: Measures time.
        stop: Set to end.
        admin_token: Opens the operator's page; empty for none.
        agent_token: Opens agents' KV events; empty for none.
    """
    router = RouterApplication(
        settings,
        store=store,
        strategy=strategy,
        clock=clock,
        admin_token=admin_token,
        agent_token=agent_token,
    )
    runner = router.runner(shutdown_timeout=CLOSE_SECONDS)
    await runner.setup()
    site = web.SockSite(runner, listener, backlog=BACKLOG)
    url = public_url(settings, listener.getsockname()[1])
    drained = asyncio.Event()

    try:
        await run_services(
            {
                **router.services(),
                "presence": announce(
                    store, clock, router_id=new_router_id(), url=url, demand=router.director.candidates.gate
                ),
                "accept": _accept(router, site, stop=stop, url=url, strategy=strategy.name),
                "drain": _drain(
                    router, runner, site, stop=stop, drained=drained, seconds=settings.drain_seconds
                ),
            },
            stop=drained,
        )
    finally:
        await runner.cleanup()
        await router.close()
        await store.close()
    _log.info("router stopped")


async def _accept(
    router: RouterApplication, site: web.SockSite, *, stop: asyncio.Event, url: str, strategy: str
) -> None:
    """Begins to accept once there is a view.

    Whoever connects earlier waits in the socket's queue or goes to another worker, instead of being told
    that this one knows nothing yet.
    """
    await router.wait_view(START_VIEW_SECONDS)
    if not stop.is_set():
        await site.start()
        _log.info("router listens", url=url, strategy=strategy)
    await asyncio.Event().wait()


async def _drain(
    router: RouterApplication,
    runner: web.BaseRunner,
    site: web.SockSite,
    *,
    stop: asyncio.Event,
    drained: asyncio.Event,
    seconds: float,
) -> None:
    """Stops accepting when told to, lets requests in flight end, then sets `drained`."""
    await stop.wait()
    if site in runner.sites:
        await site.stop()
    # A request that has just been accepted is counted before the idle connections are closed.
    await asyncio.sleep(0)
    if runner.server is not None:
        runner.server.pre_shutdown()
    _log.info("router stops accepting", in_flight=router.serving.in_flight)
    # The view goes on meanwhile: what is in flight may still have to fail over.
    if not await router.serving.wait_idle(seconds):
        _log.warning("drain period is over, requests are cut off", in_flight=router.serving.in_flight)
    await runner.cleanup()
    drained.set()
    await asyncio.Event().wait()
