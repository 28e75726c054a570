"""Composition root of the control plane: makes the parts, connects them, runs them, stops them in order.

In come settings, out come two listening ports and the leader's loop. It starts without etcd and never
ends because etcd went away: until the store has been read, health says NOT_SERVING and calls answer
UNAVAILABLE. It decides nothing.
"""

import asyncio
import fcntl
import os
import uuid
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import grpc
import structlog
from millrace.state.v1 import records_pb2
from prometheus_client import Gauge

from controlplane.api.context import Addresses, ApiContext
from controlplane.api.idempotency import RequestMemory
from controlplane.api.models import FileModelSource
from controlplane.api.policy import CONTROL_PLANE_POLICY
from controlplane.api.servicer import SERVICE_NAME, SchedulerServicer
from controlplane.api.sizer import Sizer
from controlplane.api.view import ClusterView
from controlplane.events import EventLog
from controlplane.fleet.service import SERVICE_NAME as FLEET_SERVICE_NAME
from controlplane.fleet.service import FleetService
from controlplane.gateway.app import Gateway, build_app, start_gateway
from controlplane.gateway.backend import Backend
from controlplane.knowledge import load_environments, load_knowledge
from controlplane.reconciler import Reconciler
from controlplane.scheduler import Policy
from controlplane.settings import ControlPlaneSettings
from core import VERSION
from core.clock import Clock, SystemClock
from core.errors import Unavailable
from core.identity import Principal, Role, TokenAuthenticator
from core.rpc import RpcServer, TlsFiles, start_server
from core.settings import read_token, readable_by_others
from core.store import Store, StoreUnavailable
from core.store.election import Leadership
from core.store.etcd import EtcdStore
from core.tasks import run_services

_log = structlog.get_logger(__name__)

# How often a control plane that waits for etcd says so.
_WAIT_LOG_SECONDS = 10.0
# Events of the last moment are worth so long a wait at the end, not more.
_DRAIN_EVENTS_SECONDS = 2.0
_WILDCARDS = {"0.0.0.0": "127.0.0.1", "::": "[::1]", "": "127.0.0.1"}  # noqa: S104 - compared, not bound

Started = TypeVar("Started")

_view_age = Gauge("millrace_controlplane_view_age_seconds", "Time since the store's last word to the API")


class ControlPlane:
    """One control-plane process.

    Attributes:
        grpc_port: Port of the gRPC services, once they listen.
        gateway_port: Port of the HTTP gateway, once it listens.
        listening: Set once both do.
    """

    def __init__(
        self, settings: ControlPlaneSettings, *, store: Store | None = None, clock: Clock | None = None
    ) -> None:
        """Prepares; does no I/O.

        Args:
            settings: Options.
            store: Where state is kept; None takes the etcd of the settings.
            clock: Time; None takes the machine's.
        """
        self.grpc_port = 0
        self.gateway_port = 0
        self.listening = asyncio.Event()
        self._settings = settings
        self._given_store = store
        self._clock: Clock = clock or SystemClock()

    async def run(self, stop: asyncio.Event) -> None:
        """Runs until `stop` is set.

        Raises:
            Unavailable: A port is taken, or another process uses the data directory.
        """
        settings = self._settings
        _warn_of_open_tokens(settings)
        async with AsyncExitStack() as stack:
            member_id = stack.enter_context(_membership(settings.data_directory))
            store = self._given_store or EtcdStore(settings.etcd())
            stack.push_async_callback(store.close)
            view = ClusterView(store, self._clock)
            events = EventLog(store, self._clock)
            fleet = FleetService(
                store,
                self._clock,
                events,
                heartbeat_seconds=settings.heartbeat_seconds,
                stats_seconds=settings.stats_seconds,
                lost_after_seconds=settings.lost_after_seconds,
            )
            addresses = Addresses(router_url=settings.router_url, gateway_url=settings.gateway_url)
            servicer = SchedulerServicer(self._context(store, view, events, addresses))

            def register(server: grpc.aio.Server) -> None:
                servicer.register(server)
                fleet.register(server)

            public, backend_target = await self._serve_grpc(stack, register)
            gateway = await self._serve_gateway(stack, backend_target, view)
            if not addresses.gateway_url:
                addresses.gateway_url = _told_url(settings, gateway.port)
            self.grpc_port, self.gateway_port = public.port, gateway.port
            leadership = Leadership(
                store,
                member_id,
                records_pb2.LeaderRecord(grpc_target=f"{settings.grpc_host}:{public.port}"),
                clock=self._clock,
            )
            reconciler = Reconciler(
                store,
                self._clock,
                leadership,
                events,
                drain_seconds=settings.drain_seconds,
                environments=load_environments(settings.environments_file),
            )
            _log.info(
                "control plane listens",
                grpc=f"{settings.grpc_host}:{public.port}",
                gateway=addresses.gateway_url,
                release=VERSION,
                member=member_id,
            )
            self.listening.set()
            await run_services(
                {
                    "api-view": view.run(),
                    "event-log": events.run(),
                    "fleet": fleet.run(),
                    "reconciler": reconciler.run(),
                    "readiness": self._announce_readiness(view, public),
                },
                stop=stop,
                on_stop=lambda: self._wind_down(public, gateway, events),
            )

    def _context(self, store: Store, view: ClusterView, events: EventLog, addresses: Addresses) -> ApiContext:
        return ApiContext(
            store=store,
            clock=self._clock,
            view=view,
            events=events,
            sizer=Sizer(view, FileModelSource(load_knowledge()), load_knowledge()),
            memory=RequestMemory(self._clock),
            addresses=addresses,
            fleet_token=read_token(self._settings.fleet_token_file),
            agent_tls=self._settings.tls(),
            environments=load_environments(self._settings.environments_file),
            policy=replace(Policy(), drain=timedelta(seconds=self._settings.drain_seconds)),
        )

    async def _serve_grpc(
        self, stack: AsyncExitStack, register: Callable[[grpc.aio.Server], None]
    ) -> tuple[RpcServer, str]:
        """Starts the gRPC services; returns them and where the gateway finds them."""
        settings = self._settings
        authenticator = TokenAuthenticator(
            {
                read_token(settings.admin_token_file): Principal("admin", Role.ADMIN),
                read_token(settings.fleet_token_file): Principal("fleet", Role.AGENT),
            }
        )

        async def serve(host: str, port: int, tls: TlsFiles | None) -> RpcServer:
            server = await start_server(
                host=host,
                port=port,
                register=register,
                service_names=(SERVICE_NAME, FLEET_SERVICE_NAME),
                authenticator=authenticator,
                policy=CONTROL_PLANE_POLICY,
                tls=tls,
            )
            stack.push_async_callback(server.stop, 0)
            return server

        public = await _naming_option(
            "--grpc-port", serve(settings.grpc_host, settings.grpc_port, settings.tls())
        )
        await public.set_serving(serving=False)
        if settings.tls_certificate is None:
            return public, f"{_WILDCARDS.get(settings.grpc_host, settings.grpc_host)}:{public.port}"
        # Behind TLS the public port asks for names and client certificates that the gateway, in the same
        # process, need not show: it has a door of its own, on this machine only, with the same rules.
        own = await serve("127.0.0.1", 0, None)
        return public, f"127.0.0.1:{own.port}"

    async def _serve_gateway(self, stack: AsyncExitStack, target: str, view: ClusterView) -> Gateway:
        settings = self._settings
        backend = Backend(target)
        stack.push_async_callback(backend.close)
        gateway = await _naming_option(
            "--gateway-port",
            start_gateway(
                build_app(backend, ready=lambda: view.synced),
                host=settings.gateway_host,
                port=settings.gateway_port,
                tls=settings.tls(),
            ),
        )
        stack.push_async_callback(gateway.stop)
        return gateway

    async def _announce_readiness(self, view: ClusterView, server: RpcServer) -> None:
        """Says NOT_SERVING until the store has been read, and reports the view's age from then on."""
        while True:
            try:
                await view.wait_synced(_WAIT_LOG_SECONDS)
            except StoreUnavailable as error:
                _log.warning("waiting for etcd", endpoints=self._settings.etcd_endpoints, error=error.message)
                continue
            break
        await server.set_serving(serving=True)
        _log.info("control plane serves")
        _view_age.set_function(view.age_seconds)
        await asyncio.Event().wait()

    async def _wind_down(self, server: RpcServer, gateway: Gateway, events: EventLog) -> None:
        """Refuses new work, lets calls end, and writes the last events."""
        _log.info("control plane stops")
        await server.set_serving(serving=False)
        await gateway.stop()
        await server.stop()
        try:
            async with asyncio.timeout(_DRAIN_EVENTS_SECONDS):
                await events.drained()
        except TimeoutError:
            _log.warning("some events were not written before the end")


@contextmanager
def _membership(directory: Path) -> Iterator[str]:
    """Holds the data directory, and yields the stable identity in it.

    Raises:
        Unavailable: Another process holds it, or it cannot be written.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = os.open(directory / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise Unavailable(f"--data-directory {directory} cannot be used: {error.strerror}") from error
    try:
        try:
            # Two processes of one identity would take the lead from each other for ever.
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise Unavailable(
                f"another control plane uses --data-directory {directory}; give each its own"
            ) from error
        yield _member_id(directory / "member_id")
    finally:
        os.close(lock)


def _member_id(path: Path) -> str:
    if path.exists() and (known := path.read_text().strip()):
        return known
    made = str(uuid.uuid4())
    draft = path.with_suffix(".new")
    draft.write_text(made + "\n")
    draft.replace(path)
    return made


async def _naming_option(option: str, starting: Awaitable[Started]) -> Started:
    try:
        return await starting
    except Unavailable as error:
        raise Unavailable(f"{error.message} (choose another with {option})") from error


def _told_url(settings: ControlPlaneSettings, port: int) -> str:
    scheme = "https" if settings.tls_certificate is not None else "http"
    host = _WILDCARDS.get(settings.gateway_host)
    if host is not None:
        _log.warning(
            "users are told a gateway URL of this machine only; give the one they can reach",
            option="--gateway-url",
        )
    return f"{scheme}://{host or settings.gateway_host}:{port}"


def _warn_of_open_tokens(settings: ControlPlaneSettings) -> None:
    for path in (settings.admin_token_file, settings.fleet_token_file):
        if readable_by_others(path):
            _log.warning(
                "other users of this machine can read a credential's file", path=str(path), remedy="chmod 600"
            )
