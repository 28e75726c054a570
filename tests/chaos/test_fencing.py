"""An old leader that is stopped in the middle of a commit and wakes up after another has taken over."""

import asyncio
import signal
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing
from pathlib import Path

import aiohttp
import pytest
import pytest_asyncio
from millrace.core.v1 import node_pb2, replica_pb2, types_pb2
from millrace.state.v1 import records_pb2

from core.store import EtcdStore, Put, keys
from core.tasks import cancel_and_wait
from tests.chaos.cluster import ADMIN_TOKEN, FLEET_TOKEN, GIBIBYTE, HOST
from tests.chaos.link import Link
from tests.chaos.processes import ManagedProcess
from tests.support.etcd import EtcdProcess
from tests.support.ports import free_ports
from tests.support.waiting import eventually

pytestmark = pytest.mark.integration

REPLICAS = 2


class Member:
    """One control plane on a plain etcd: the wire must be able to read what it carries."""

    def __init__(self, folder: Path, name: str, etcd_port: int) -> None:
        self.data = folder / name
        for kind, token in (("admin", ADMIN_TOKEN), ("fleet", FLEET_TOKEN)):
            path = folder / f"{kind}.token"
            path.touch(mode=0o600)
            path.write_text(token)
        grpc_port, gateway_port = free_ports(2)
        self.url = f"http://{HOST}:{gateway_port}"
        command = [
            *(sys.executable, "-m", "controlplane"),
            f"--grpc-port={grpc_port}",
            f"--gateway-port={gateway_port}",
            f"--etcd-endpoints={HOST}:{etcd_port}",
            f"--data-directory={self.data}",
            f"--admin-token-file={folder / 'admin.token'}",
            f"--fleet-token-file={folder / 'fleet.token'}",
        ]
        self.process = ManagedProcess(name, command, folder / f"{name}.log")

    @property
    def member_id(self) -> str:
        return (self.data / "member_id").read_text().strip()

    async def get(self, path: str) -> tuple[int, str]:
        async with aiohttp.ClientSession(trust_env=False) as session:
            try:
                async with session.get(self.url + path, timeout=aiohttp.ClientTimeout(total=2)) as answer:
                    return answer.status, await answer.text()
            except (aiohttp.ClientError, TimeoutError):
                return 0, ""

    async def declare(self, name: str) -> None:
        body = {
            "models": [{"name": name, "model": "any", "engine": "simulator", "replicas": REPLICAS}],
            "namespace": "team",
        }
        headers = {"Authorization": f"Bearer {ADMIN_TOKEN}"}
        async with (
            aiohttp.ClientSession(headers=headers, trust_env=False) as session,
            session.post(f"{self.url}/v1/deployments", json=body) as answer,
        ):
            assert answer.status == 201, await answer.text()

    async def serves(self) -> bool:
        return (await self.get("/health"))[0] == 200

    async def leads(self) -> bool:
        return "\nmillrace_reconciler_is_leader 1.0\n" in (await self.get("/metrics"))[1]

    async def follows(self) -> bool:
        return "\nmillrace_reconciler_is_leader 0.0\n" in (await self.get("/metrics"))[1]


@pytest.fixture
def etcd() -> Iterator[EtcdProcess]:
    with EtcdProcess() as process:
        yield process


@pytest_asyncio.fixture
async def store(etcd: EtcdProcess) -> AsyncIterator[EtcdStore]:
    opened = await EtcdStore.connect(etcd.settings)
    yield opened
    await opened.close()


@pytest_asyncio.fixture
async def link(etcd: EtcdProcess) -> AsyncIterator[Link]:
    opened = await Link(HOST, int(etcd.endpoint.rpartition(":")[2])).open()
    yield opened
    await opened.close()


@pytest_asyncio.fixture
async def members(tmp_path: Path, etcd: EtcdProcess, link: Link) -> AsyncIterator[tuple[Member, Member]]:
    """The old leader, whose wire to etcd can stop, and the one that will follow it."""
    old = Member(tmp_path, "old", link.port)
    new = Member(tmp_path, "new", int(etcd.endpoint.rpartition(":")[2]))
    try:
        old.process.start()
        await eventually(old.leads, timeout_seconds=20)
        new.process.start()
        await eventually(new.serves, timeout_seconds=20)
        yield old, new
    finally:
        old.process.kill()
        new.process.kill()


async def _add_node(store: EtcdStore) -> None:
    engine = node_pb2.EngineEnvironment(
        engine=types_pb2.ENGINE_SIMULATOR, device_kinds=[types_pb2.DEVICE_KIND_CPU]
    )
    cpu = node_pb2.Device(id="cpu", kind=types_pb2.DEVICE_KIND_CPU, memory_bytes=8 * GIBIBYTE)
    record = records_pb2.NodeObservationRecord(
        inventory=node_pb2.NodeInventory(node="node-1", devices=[cpu], engines=[engine]),
        state=types_pb2.NODE_STATE_READY,
    )
    await store.commit([Put(keys.actual_node("node-1"), record.SerializeToString())])


async def _history(store: EtcdStore, start: int, seen: list[replica_pb2.ReplicaAssignment]) -> None:
    """Notes every write of an assignment, also of those that are gone again."""
    async with aclosing(store.watch(keys.PLAN_REPLICAS, start_revision=start)) as batches:
        async for batch in batches:
            seen.extend(
                replica_pb2.ReplicaAssignment.FromString(event.value.value)
                for event in batch.events
                if event.value is not None
            )


async def test_a_leader_that_sleeps_through_its_commit_writes_nothing_when_it_wakes(
    members: tuple[Member, Member], store: EtcdStore, link: Link
) -> None:
    old, new = members
    await _add_node(store)
    start = (await store.list(keys.ROOT)).revision + 1
    seen: list[replica_pb2.ReplicaAssignment] = []
    watching = asyncio.create_task(_history(store, start, seen), name="history")
    first = await store.get(keys.LIVE_LEADER)
    assert first is not None
    assert old.member_id.encode() in first.value

    # The plan of the old leader stops on its way to etcd; then the leader itself stops.
    link.stop_at(keys.LIVE_LEADER.encode(), keys.PLAN_REPLICAS.encode())
    await new.declare("chat")
    async with asyncio.timeout(10):
        await link.stopped.wait()
    old.process.signal(signal.SIGSTOP)
    assert not seen

    await eventually(new.leads, timeout_seconds=15)
    await eventually(lambda: len(seen) == REPLICAS)
    second = await store.get(keys.LIVE_LEADER)
    assert second is not None
    assert second.create_revision > first.create_revision

    # What was on its way arrives now, before its sender knows that it was replaced.
    link.mend()
    old.process.signal(signal.SIGCONT)
    await eventually(old.follows, timeout_seconds=15)
    await new.declare("another")
    await eventually(lambda: len(seen) == 2 * REPLICAS)
    await cancel_and_wait(watching)

    assert {each.fencing_token for each in seen} == {second.create_revision}
    assert sorted(each.deployment for each in seen) == ["another", "another", "chat", "chat"]
    page = await store.list(keys.PLAN_REPLICAS)
    assert {replica_pb2.ReplicaAssignment.FromString(item.value).replica for item in page.items} == {
        each.replica for each in seen
    }
    third = await store.get(keys.LIVE_LEADER)
    assert third is not None
    assert third.create_revision == second.create_revision
