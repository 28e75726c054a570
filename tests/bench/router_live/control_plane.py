"""What a control plane would have written, in a real etcd: endpoints, deployment, key, samples every second.

In: the URLs of engines that speak vLLM's metrics. Out: an etcd that a `millrace-router` reads as in
production, and an API key. Samples come from the engines' own metrics pages through the node agent's parser.
Must not: know anything about requests; the router under test sees nothing that a user's router would not.
"""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import aiohttp
from millrace.core.v1 import deployment_pb2, policy_pb2, stats_pb2
from millrace.state.v1 import records_pb2

from core.clock import SystemClock, to_timestamp
from core.identity import generate_api_key, hash_secret
from core.store import Delete, Put, keys
from core.store.etcd import EtcdStore
from core.store.types import StoreError
from core.tasks import cancel_and_wait
from nodeagent.engines.metrics_text import VLLM_NAMES, parse_stats
from tests.support.etcd import EtcdProcess
from tests.support.router_cluster import DEPLOYMENT, NAMESPACE, endpoint_record

SAMPLE_SECONDS = 1.0
INCARNATION = "run-1"


@dataclass
class ControlPlane:
    """An etcd with one deployment in it.

    Attributes:
        etcd: The process; a test may pause or kill it.
        api_key: Of the deployment's namespace.
        frozen: While true, no new samples are written: the last ones stay and grow old.
        missed_samples: Scrapes and writes that failed.
    """

    etcd: EtcdProcess
    store: EtcdStore
    api_key: str
    engines: dict[str, str]
    frozen: bool = False
    missed_samples: int = 0
    latest: dict[str, stats_pb2.EngineStats] = field(default_factory=dict)

    async def withdraw(self, replica: str) -> None:
        """Takes an endpoint out, as the reconciler does with one that has failed."""
        self.engines.pop(replica)
        await self.store.commit([Delete(keys.serve_endpoint(NAMESPACE, DEPLOYMENT, replica))])

    async def sample_forever(self) -> None:
        """Scrapes every engine once a period and writes its sample."""
        timeout = aiohttp.ClientTimeout(total=SAMPLE_SECONDS)
        async with aiohttp.ClientSession(timeout=timeout, trust_env=False) as session:
            while True:
                if not self.frozen:
                    await asyncio.gather(
                        *(self._sample(session, replica, url) for replica, url in list(self.engines.items()))
                    )
                await asyncio.sleep(SAMPLE_SECONDS)

    async def _sample(self, session: aiohttp.ClientSession, replica: str, url: str) -> None:
        try:
            async with session.get(f"{url}/metrics") as answer:
                stats = parse_stats(await answer.text(), VLLM_NAMES)
            stats.namespace, stats.deployment, stats.replica = NAMESPACE, DEPLOYMENT, replica
            stats.incarnation = INCARNATION
            stats.sample_time.CopyFrom(to_timestamp(SystemClock().now()))
            self.latest[replica] = stats
            key = keys.stats(NAMESPACE, DEPLOYMENT, replica)
            await self.store.commit([Put(key, stats.SerializeToString())])
        except (aiohttp.ClientError, TimeoutError, StoreError):
            # An engine that died or an etcd that is away is what some benchmarks are about.
            self.missed_samples += 1


@asynccontextmanager
async def control_plane(
    engine_urls: Sequence[str],
    *,
    served_model_name: str = DEPLOYMENT,
    routing: policy_pb2.Routing | None = None,
) -> AsyncIterator[ControlPlane]:
    """Runs an etcd that holds the engines as endpoints `chat-0`, `chat-1`, ... of one deployment."""
    etcd = EtcdProcess()
    await asyncio.to_thread(etcd.start)
    engines = {f"{DEPLOYMENT}-{number}": url for number, url in enumerate(engine_urls)}
    store = await EtcdStore.connect(etcd.settings)
    api_key = generate_api_key()
    spec = deployment_pb2.DeploymentSpec(model="m", routing=routing)
    deployment = records_pb2.DeploymentRecord(namespace=NAMESPACE, name=DEPLOYMENT, spec=spec)
    record = records_pb2.ApiKeyRecord(key_hash=hash_secret(api_key), namespace=NAMESPACE)
    writes = [
        Put(keys.spec_deployment(NAMESPACE, DEPLOYMENT), deployment.SerializeToString()),
        Put(keys.spec_key(hash_secret(api_key)), record.SerializeToString()),
    ]
    for replica, url in engines.items():
        endpoint = endpoint_record(replica, url, served_model_name=served_model_name, incarnation=INCARNATION)
        writes.append(Put(keys.serve_endpoint(NAMESPACE, DEPLOYMENT, replica), endpoint.SerializeToString()))
    sampler: asyncio.Task[None] | None = None
    try:
        await store.commit(writes)
        plane = ControlPlane(etcd, store, api_key, engines)
        sampler = asyncio.create_task(plane.sample_forever(), name="sampler")
        yield plane
    finally:
        await cancel_and_wait(sampler)
        await store.close()
        await asyncio.to_thread(etcd.stop)
