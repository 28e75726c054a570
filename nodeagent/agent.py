"""The composition root of the node agent: builds the parts, runs them, ends them in order.

In: settings. Out: a running agent. At the start it adopts the engines that an earlier agent left, before
it talks to anyone; at the end it leaves them running, unless it was told to stop them.
"""

import asyncio
from contextlib import suppress

import aiohttp
import grpc
import structlog
from aiohttp import web
from millrace.agent.v1 import node_agent_service_pb2_grpc

from core import errors
from core.clock import Clock, SystemClock
from core.identity import Principal, Role, TokenAuthenticator
from core.rpc import RpcServer, open_channel, start_server
from core.settings import read_token
from core.tasks import run_services
from nodeagent import logs
from nodeagent.api import POLICY, SERVICE, NodeAgentServicer
from nodeagent.devices.base import DeviceSource
from nodeagent.devices.cpu import CpuDevices
from nodeagent.devices.nvml import NvmlDevices
from nodeagent.devices.static import StaticDevices
from nodeagent.engines.registry import EngineAdapters, default_adapters
from nodeagent.health import EngineProbe
from nodeagent.inventory import Inventory
from nodeagent.journal import Journal
from nodeagent.kv_events.registry import KvEvents
from nodeagent.lifecycle import Lifecycle, LifecycleLimits
from nodeagent.metrics import AgentMetrics
from nodeagent.reporting import Reporter
from nodeagent.runtimes.base import LABEL_HOME, LABEL_NODE
from nodeagent.runtimes.ports import PortAllocator
from nodeagent.runtimes.process import ProcessRuntime
from nodeagent.session import Session
from nodeagent.settings import AgentSettings
from nodeagent.stats import StatsCollector
from nodeagent.supervisor import Supervisor

_log = structlog.get_logger(__name__)

# At the end, reports of stopped engines get this long to be accepted.
LAST_REPORT_SECONDS = 1.0


class Agent:
    """One node agent.

    Attributes:
        supervisor: The replicas.
        session: The session with the control plane.
        inventory: What the machine has.
        grpc_port: Port of NodeAgentService once `start` has returned.
        metrics_port: Port of /metrics once `start` has returned.
    """

    def __init__(self, settings: AgentSettings, *, clock: Clock | None = None) -> None:
        """Builds the parts; call within a running event loop.

        Raises:
            InvalidArgument: A file that the settings name is not of the right form.
        """
        self._settings = settings
        clock = clock or SystemClock()
        data = settings.data_directory.absolute()
        self._log_directory = data / "logs"
        labels = {LABEL_NODE: settings.node_name, LABEL_HOME: str(data)}
        sources = _device_sources(settings)
        adapters = _adapters(settings, sources)
        self.inventory = Inventory(
            node=settings.node_name,
            advertise_host=settings.advertise_host,
            labels=settings.labels,
            sources=sources,
            adapters=adapters,
            clock=clock,
        )
        # Engines are near: a proxy of the environment has no business between them and us.
        self._http = aiohttp.ClientSession(trust_env=False, connector=aiohttp.TCPConnector(limit=256))
        probe = EngineProbe(self._http)
        runtime = ProcessRuntime()
        journal = Journal(data / "journal")
        self._reporter = Reporter()
        self.supervisor = Supervisor(
            node=settings.node_name,
            log_directory=self._log_directory,
            clock=clock,
            journal=journal,
            runtime=runtime,
            reporter=self._reporter,
            labels=labels,
        )
        self.supervisor.attach(
            Lifecycle(
                node=settings.node_name,
                host=settings.advertise_host,
                labels=labels,
                clock=clock,
                adapters=adapters,
                runtime=runtime,
                inventory=self.inventory,
                ports=PortAllocator(
                    settings.engine_port_first, settings.engine_port_last, settings.advertise_host
                ),
                probe=probe,
                journal=journal,
                observer=self.supervisor,
                limits=LifecycleLimits(start_timeout=settings.start_timeout_seconds),
            )
        )
        self._stats = StatsCollector(
            replicas=self.supervisor.replicas.values,
            adapters=adapters,
            probe=probe,
            inventory=self.inventory,
            clock=clock,
        )
        self._kv_events = KvEvents(
            replicas=self.supervisor.replicas.values, sources=probe.kv_event_sources, clock=clock
        )
        self._clock = clock
        self._server: RpcServer | None = None
        self._runner: web.AppRunner | None = None
        self.grpc_port = 0
        self.metrics_port = 0
        self._dial_out()

    def _dial_out(self) -> None:
        """Builds the session and what is told of it; nothing is sent before `run`."""
        settings = self._settings
        self._channels: dict[str, grpc.aio.Channel] = {
            target: open_channel(target, tls=settings.tls()) for target in settings.controlplane_targets
        }
        self.session = Session(
            channels=self._channels,
            token=read_token(settings.fleet_token_file),
            inventory=self.inventory.read,
            supervisor=self.supervisor,
            reporter=self._reporter,
            stats=self._stats,
            clock=self._clock,
        )
        self._metrics = AgentMetrics(
            replicas=self.supervisor.replicas.values, session=self.session.state, stats=self._stats
        )
        self.supervisor.on_started = self._metrics.engine_start_seconds.observe

    async def run(self, stop: asyncio.Event) -> None:
        """Runs until `stop` is set.

        Raises:
            Unavailable: A port is taken, or the journal cannot be used.
        """
        try:
            await self._start()
            services = {
                "session": self.session.run(),
                "orphans": self.supervisor.collect_orphans(),
                "stats": self._stats.run(),
                "kv-events": self._kv_events.run(),
                "log-rotation": self._rotate_logs(),
            }
            await run_services(services, stop=stop, on_stop=self._on_stop)
        finally:
            await self._close()

    async def _start(self) -> None:
        settings = self._settings
        try:
            self._server = await start_server(
                host=settings.grpc_host,
                port=settings.grpc_port,
                register=self._register,
                service_names=[SERVICE],
                authenticator=TokenAuthenticator(_principals(settings)),
                policy=POLICY,
                tls=settings.tls(),
            )
        except errors.Unavailable as error:
            raise errors.Unavailable(f"{error.message} Set --grpc-port") from error
        self.grpc_port = self._server.port
        self.inventory.agent_target = settings.grpc_target or f"{settings.grpc_host}:{self.grpc_port}"
        self._runner = web.AppRunner(self._metrics.application(), access_log=None)
        await self._runner.setup()
        site = web.TCPSite(self._runner, settings.metrics_host, settings.metrics_port)
        try:
            await site.start()
        except OSError as error:
            address = f"{settings.metrics_host}:{settings.metrics_port}"
            raise errors.Unavailable(
                f"cannot listen on {address}: is the port taken? Set --metrics-port"
            ) from error
        self.metrics_port = self._runner.addresses[0][1]
        await self.supervisor.adopt()
        _log.info(
            "node agent runs",
            node=settings.node_name,
            grpc_port=self.grpc_port,
            metrics_port=self.metrics_port,
            controlplane=settings.controlplane_target,
            replicas=len(self.supervisor.replicas),
        )

    def _register(self, server: grpc.aio.Server) -> None:
        servicer = NodeAgentServicer(
            inventory=self.inventory,
            supervisor=self.supervisor,
            log_directory=self._log_directory,
            kv_events=self._kv_events,
        )
        node_agent_service_pb2_grpc.add_NodeAgentServiceServicer_to_server(servicer, server)

    async def _on_stop(self) -> None:
        if not self._settings.stop_engines_on_exit:
            return
        await self.supervisor.stop_all()
        with suppress(TimeoutError):
            async with asyncio.timeout(LAST_REPORT_SECONDS):
                await self._reporter.drained()

    async def _close(self) -> None:
        await self.supervisor.close()
        if self._server is not None:
            await self._server.stop(0.5)
        if self._runner is not None:
            await self._runner.cleanup()
        for channel in self._channels.values():
            await channel.close()
        await self._http.close()

    async def _rotate_logs(self) -> None:
        while True:
            await self._clock.sleep(logs.ROTATION_PERIOD_SECONDS)
            for replica in list(self.supervisor.replicas.values()):
                try:
                    rotated = await asyncio.to_thread(logs.rotate, replica.log_path)
                except OSError as error:
                    _log.error("a log cannot be rotated", replica=replica.name, error=str(error))
                    continue
                if rotated:
                    _log.info("log rotated", replica=replica.name)


def default_cpu_threads() -> int:
    """Returns half of the processors: two engines side by side do not fight for them."""
    import psutil

    return max(1, (psutil.cpu_count() or 2) // 2)


def _device_sources(settings: AgentSettings) -> list[DeviceSource]:
    if settings.devices_file is not None:
        return [StaticDevices(settings.devices_file)]
    return [CpuDevices(settings.cpu_memory_fraction), NvmlDevices()]


def _adapters(settings: AgentSettings, sources: list[DeviceSource]) -> EngineAdapters:
    sockets = settings.data_directory.absolute() / "sockets"
    return default_adapters(
        engine_directory=settings.engine_directory,
        device_kinds=frozenset(device.kind for source in sources for device in source.devices()),
        cpu_threads=settings.cpu_threads or default_cpu_threads(),
        socket_directory=sockets,
    )


def _principals(settings: AgentSettings) -> dict[str, Principal]:
    principals = {read_token(settings.fleet_token_file): Principal("fleet", Role.AGENT)}
    if settings.admin_token_file is not None:
        principals[read_token(settings.admin_token_file)] = Principal("admin", Role.ADMIN)
    if settings.router_token_file is not None:
        principals[read_token(settings.router_token_file)] = Principal("router", Role.ROUTER)
    return principals
