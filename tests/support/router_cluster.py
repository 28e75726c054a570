"""A router in this process, over a store in memory and engines of the test's choice."""

import asyncio
import socket
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, cast

import aiohttp
from aiohttp import web
from millrace.core.v1 import deployment_pb2, endpoint_pb2, policy_pb2, stats_pb2, types_pb2
from millrace.state.v1 import records_pb2

from core.clock import SystemClock, to_timestamp
from core.identity import generate_api_key, hash_secret
from core.settings import read_token
from core.store import Delete, Put, keys
from core.store.memory import MemoryStore
from core.tasks import cancel_and_wait
from router.app import RouterApplication
from router.metering.usage import Usage
from router.metrics import RouterMetrics
from router.picking.registry import build_strategy
from router.settings import RouterSettings
from router.view.view import EndpointState
from tests.support.waiting import eventually

NAMESPACE = "team-a"
DEPLOYMENT = "chat"
MODEL = "organisation/chat-model"


def endpoint_record(
    replica: str,
    url: str,
    *,
    namespace: str = NAMESPACE,
    deployment: str = DEPLOYMENT,
    served_model_name: str | None = None,
    state: EndpointState = EndpointState.READY,
    incarnation: str = "run-1",
    declared_model: str = MODEL,
    engine: types_pb2.Engine.ValueType = types_pb2.ENGINE_VLLM,
) -> endpoint_pb2.Endpoint:
    return endpoint_pb2.Endpoint(
        namespace=namespace,
        deployment=deployment,
        replica=replica,
        url=url,
        served_model_name=deployment if served_model_name is None else served_model_name,
        declared_model=declared_model,
        state=cast("types_pb2.EndpointState.ValueType", state.value),
        incarnation=incarnation,
        weight=1,
        node="node-1",
        engine=engine,
    )


@dataclass
class Cluster:
    """What a test sees of the router and its store."""

    store: MemoryStore
    router: RouterApplication
    url: str
    api_key: str
    client: aiohttp.ClientSession
    runner: web.BaseRunner
    usages: list[Usage]

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.api_key}"}

    async def put(self, key: str, message: Any) -> None:
        await self.store.commit([Put(key, message.SerializeToString())])

    async def declare(
        self, name: str, *, namespace: str = NAMESPACE, model: str = MODEL, **spec: Any
    ) -> None:
        await self.put(
            keys.spec_deployment(namespace, name),
            records_pb2.DeploymentRecord(
                namespace=namespace,
                name=name,
                spec=deployment_pb2.DeploymentSpec(model=model, **spec),
                create_time=to_timestamp(SystemClock().now()),
            ),
        )

    async def make_key(
        self, namespace: str, tier: types_pb2.Tier.ValueType = types_pb2.TIER_UNSPECIFIED
    ) -> str:
        key = generate_api_key()
        await self._put_key(key, namespace, tier)
        return key

    async def add_key(self, key: str) -> None:
        """Makes a given key open the namespace, and waits until it does."""
        await self._put_key(key, NAMESPACE)
        await eventually(lambda: self.router.source.view.authenticate(hash_secret(key)))

    async def _put_key(
        self, key: str, namespace: str, tier: types_pb2.Tier.ValueType = types_pb2.TIER_UNSPECIFIED
    ) -> None:
        hashed = hash_secret(key)
        record = records_pb2.ApiKeyRecord(key_hash=hashed, namespace=namespace, tier=tier)
        await self.put(keys.spec_key(hashed), record)

    async def publish(self, *endpoints: endpoint_pb2.Endpoint) -> None:
        """Writes endpoints and waits until the router sees them."""
        for each in endpoints:
            await self.put(keys.serve_endpoint(each.namespace, each.deployment, each.replica), each)
        wanted = {(each.replica, each.url, each.incarnation, each.state) for each in endpoints}
        await eventually(
            lambda: (
                wanted
                <= {
                    (each.replica, each.url, each.incarnation, each.state.value)
                    for each in self.router.source.view.endpoints
                }
            )
        )

    async def withdraw(self, replica: str) -> None:
        await self.store.commit([Delete(keys.serve_endpoint(NAMESPACE, DEPLOYMENT, replica))])

    async def sample(
        self, replica: str, *, running: int, waiting: int = 0, deployment: str = DEPLOYMENT
    ) -> None:
        await self.put(
            keys.stats(NAMESPACE, deployment, replica),
            stats_pb2.EngineStats(
                namespace=NAMESPACE,
                deployment=deployment,
                replica=replica,
                incarnation="run-1",
                sample_time=to_timestamp(SystemClock().now()),
                running_requests=running,
                waiting_requests=waiting,
            ),
        )

    def chat(
        self, *, stream: bool = False, model: str = DEPLOYMENT, headers: Mapping[str, str] | None = None
    ) -> Any:
        body: dict[str, Any] = {"model": model, "messages": [{"role": "user", "content": "Hello"}]}
        if stream:
            body["stream"] = True
        return self.client.post(
            f"{self.url}/v1/chat/completions", json=body, headers={**self.headers, **(headers or {})}
        )

    async def metric(self, text: str) -> float:
        """Returns the value of the series that begins with a text; 0 where there is none."""
        async with self.client.get(f"{self.url}/metrics") as response:
            page = await response.text()
        return sum(float(line.rsplit(" ", 1)[1]) for line in page.splitlines() if line.startswith(text))


@dataclass
class _Usages:
    """Keeps usage for the test, and hands it to the ordinary sink."""

    kept: list[Usage]
    metrics: RouterMetrics

    def take(self, usage: Usage) -> None:
        self.kept.append(usage)
        self.metrics.take(usage)


@asynccontextmanager
async def cluster(
    *,
    strategy: str = "round-robin",
    urls: Sequence[str] = (),
    ordinary: bool = False,
    stream_continuation: bool | None = None,
    engine: types_pb2.Engine.ValueType = types_pb2.ENGINE_VLLM,
    **options: Any,
) -> AsyncIterator[Cluster]:
    """Runs a router with one namespace, one deployment and one key.

    Args:
        strategy: How it picks.
        urls: Engines that serve the deployment, as replicas `chat-0`, `chat-1`, ...
        stream_continuation: Of the deployment.
        engine: What these engines are.
        ordinary: Everything goes through aiohttp's server, nothing through the hot path.
        options: Further settings.
    """
    # Most tests have no use for a wait for what never comes.
    options.setdefault("parking_timeout_seconds", 0.05)
    settings = RouterSettings(_cli_parse_args=False, strategy=strategy, **options)
    store = MemoryStore(SystemClock())
    usages: list[Usage] = []
    metrics = RouterMetrics()
    router = RouterApplication(
        settings,
        store=store,
        strategy=build_strategy(strategy),
        clock=SystemClock(),
        admin_token="admin-token",
        agent_token=read_token(settings.agent_token_file) if settings.agent_token_file else "",
        metrics=metrics,
        usage_sink=_Usages(usages, metrics),
    )
    if ordinary:
        runner: web.BaseRunner = web.AppRunner(
            router.application, access_log=None, handler_cancellation=True, auto_decompress=False
        )
    else:
        runner = router.runner(shutdown_timeout=1)
    await runner.setup()
    listener = socket.create_server(("127.0.0.1", 0))
    await web.SockSite(runner, listener).start()
    tasks = [asyncio.create_task(body, name=name) for name, body in router.services().items()]
    client = aiohttp.ClientSession()
    made = Cluster(store, router, f"http://127.0.0.1:{listener.getsockname()[1]}", "", client, runner, usages)
    try:
        made.api_key = await made.make_key(NAMESPACE)
        await made.declare(DEPLOYMENT, routing=policy_pb2.Routing(stream_continuation=stream_continuation))
        await eventually(lambda: DEPLOYMENT in str(router.source.view.tenants))
        await eventually(lambda: router.source.view.authenticate(hash_secret(made.api_key)))
        await made.publish(*(endpoint_record(f"chat-{n}", url, engine=engine) for n, url in enumerate(urls)))
        yield made
    finally:
        await client.close()
        await runner.cleanup()
        await cancel_and_wait(*tasks)
        await router.close()
        await store.close()
