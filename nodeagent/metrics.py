"""The agent's own numbers for Prometheus, and the page that shows them.

Replicas are counted when the page is read, so that a series ends with its replica. Labels are
namespaces and deployments of what runs here, states and fixed words: bounded by what this machine holds.
"""

from collections import Counter
from collections.abc import Callable, Iterable

from aiohttp import web
from prometheus_client import CollectorRegistry, Histogram
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

from core import VERSION
from core.telemetry import render_metrics
from nodeagent.replica import Replica
from nodeagent.session import SessionState
from nodeagent.stats import StatsCollector

_START_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 60, 120, 300, 600)


class _AgentCollector(Collector):
    def __init__(
        self,
        replicas: Callable[[], Iterable[Replica]],
        session: SessionState,
        stats: StatsCollector,
    ) -> None:
        self._replicas = replicas
        self._session = session
        self._stats = stats

    def collect(self) -> Iterable[Metric]:
        replicas = list(self._replicas())
        states = GaugeMetricFamily(
            "millrace_agent_replicas",
            "Replicas on this node by state.",
            labels=["namespace", "deployment", "state"],
        )
        counts = Counter(
            (each.observation.namespace, each.observation.deployment, each.state.name.lower())
            for each in replicas
        )
        for (namespace, deployment, state), count in counts.items():
            states.add_metric([namespace, deployment, state], count)
        yield states
        healthy = GaugeMetricFamily(
            "millrace_agent_healthy_replicas",
            "Ready replicas that pass their health checks.",
            labels=["namespace", "deployment"],
        )
        sound = Counter(
            (each.observation.namespace, each.observation.deployment)
            for each in replicas
            if each.observation.healthy
        )
        for (namespace, deployment), count in sound.items():
            healthy.add_metric([namespace, deployment], count)
        yield healthy
        yield GaugeMetricFamily(
            "millrace_agent_session_connected",
            "1 while a session with the control plane is open.",
            value=float(self._session.connected),
        )
        yield CounterMetricFamily(
            "millrace_agent_sessions_opened_total",
            "Sessions opened since the agent started.",
            value=self._session.opened_total,
        )
        yield CounterMetricFamily(
            "millrace_agent_scrape_failures_total",
            "Scrapes of engines that failed.",
            value=self._stats.failures_total,
        )
        info = GaugeMetricFamily("millrace_agent_info", "1; the version is a label.", labels=["version"])
        info.add_metric([VERSION], 1)
        yield info


class AgentMetrics:
    """All series of one agent, in a registry of its own."""

    def __init__(
        self,
        *,
        replicas: Callable[[], Iterable[Replica]],
        session: SessionState,
        stats: StatsCollector,
    ) -> None:
        """Takes what is looked at when the page is read."""
        self.registry = CollectorRegistry()
        self.registry.register(_AgentCollector(replicas, session, stats))
        self.engine_start_seconds = Histogram(
            "millrace_agent_engine_start_seconds",
            "Time from an engine's start to its first token.",
            buckets=_START_BUCKETS,
            registry=self.registry,
        )

    def application(self) -> web.Application:
        """Builds the HTTP application with `/metrics` and `/health`."""

        async def page(_request: web.Request) -> web.Response:
            body, content_type = render_metrics(self.registry)
            return web.Response(body=body, headers={"content-type": content_type})

        async def health(_request: web.Request) -> web.Response:
            return web.json_response({"status": "ok"})

        application = web.Application()
        application.router.add_get("/metrics", page)
        application.router.add_get("/health", health)
        return application
