"""The router as a process: options, exit codes, signals, workers, a real etcd."""

import asyncio
import json
import os
import signal
import socket
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import IO, Any

import aiohttp
import pytest
from millrace.core.v1 import deployment_pb2
from millrace.state.v1 import records_pb2

from core.identity import generate_api_key, hash_secret
from core.store import Put, keys
from core.store.etcd import EtcdStore
from tests.support.etcd import EtcdProcess
from tests.support.fake_engine import FakeEngine, answers, silent, streams
from tests.support.router_cluster import DEPLOYMENT, NAMESPACE, endpoint_record
from tests.support.waiting import eventually

pytestmark = pytest.mark.integration

# Nothing listens there: a router must live without its store.
NO_ETCD = "127.0.0.1:1"


class RouterProcess:
    """A running `millrace-router` and its log."""

    def __init__(self, process: asyncio.subprocess.Process, log: IO[bytes]) -> None:
        self.process = process
        self._log = log

    @property
    def lines(self) -> list[dict[str, Any]]:
        text = Path(self._log.name).read_text(encoding="utf-8")
        return [json.loads(line) for line in text.splitlines() if line.startswith("{") and line.endswith("}")]

    @property
    def text(self) -> str:
        return Path(self._log.name).read_text(encoding="utf-8")

    def found(self, message: str) -> list[dict[str, Any]]:
        return [line for line in self.lines if line["message"] == message]

    @property
    def url(self) -> str:
        return str(self.found("router listens")[0]["url"])

    async def exit_code(self) -> int:
        async with asyncio.timeout(20):
            return await self.process.wait()


@asynccontextmanager
async def router(*arguments: str) -> AsyncIterator[RouterProcess]:
    with tempfile.NamedTemporaryFile(suffix=".log") as log:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "router", "--log-style", "json", *arguments, stderr=log
        )
        running = RouterProcess(process, log)
        try:
            yield running
        finally:
            if process.returncode is None:
                process.terminate()
                await running.exit_code()


async def listening(it: RouterProcess, workers: int = 1) -> None:
    await eventually(lambda: len(it.found("router listens")) >= workers, timeout_seconds=20)


async def test_wrong_options_exit_2_with_one_line() -> None:
    for arguments, expected in (
        (["--strategy", "guess"], "--strategy: `guess` is not known; known: default, full-cache-guard, "),
        (["--port", "70000"], "--port: "),
        (["--etcd-endpoints", "http://x"], "is not host:port"),
        (["--admin-token-file", "/nonexistent/token"], "/nonexistent/token"),
    ):
        async with router(*arguments) as it:
            assert await it.exit_code() == 2
            assert expected in it.text
            assert len(it.text.strip().splitlines()) == 1


async def test_taken_port_exits_1_naming_port_and_option() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for workers in ("1", "2"):
            async with router("--port", str(port), "--workers", workers) as it:
                assert await it.exit_code() == 1
                assert f"port {port}" in it.text
                assert "--port" in it.text


async def test_without_etcd_it_is_not_healthy_and_stops_cleanly() -> None:
    async with router("--port", "0", "--etcd-endpoints", NO_ETCD) as it, aiohttp.ClientSession() as client:
        await listening(it)
        async with client.get(f"{it.url}/health") as response:
            assert (response.status, (await response.json())["view_synced"]) == (503, False)
        async with client.get(f"{it.url}/v1/models", headers={"Authorization": "Bearer sk-x"}) as response:
            assert response.status == 503
            assert response.headers["x-millrace-reason"] == "view_not_synced"
        it.process.terminate()
        assert await it.exit_code() == 0


@asynccontextmanager
async def etcd_with_deployment(engine_url: str) -> AsyncIterator[tuple[EtcdProcess, str]]:
    """A real etcd in which one deployment with one endpoint and a key is written."""
    etcd = EtcdProcess()
    await asyncio.to_thread(etcd.start)
    try:
        store = await EtcdStore.connect(etcd.settings)
        key = generate_api_key()
        endpoint = endpoint_record("chat-0", engine_url)
        deployment = records_pb2.DeploymentRecord(
            namespace=NAMESPACE, name=DEPLOYMENT, spec=deployment_pb2.DeploymentSpec(model="m")
        )
        api_key = records_pb2.ApiKeyRecord(key_hash=hash_secret(key), namespace=NAMESPACE)
        await store.commit(
            [
                Put(keys.serve_endpoint(NAMESPACE, DEPLOYMENT, "chat-0"), endpoint.SerializeToString()),
                Put(keys.spec_deployment(NAMESPACE, DEPLOYMENT), deployment.SerializeToString()),
                Put(keys.spec_key(hash_secret(key)), api_key.SerializeToString()),
            ]
        )
        await store.close()
        yield etcd, key
    finally:
        await asyncio.to_thread(etcd.stop)


async def test_serves_from_a_real_etcd_and_without_it_and_drains() -> None:
    gate = asyncio.Event()
    async with (
        FakeEngine(answers(200, b'{"choices":[]}')) as engine,
        etcd_with_deployment(engine.url) as (etcd, key),
        router("--port", "0", "--etcd-endpoints", etcd.endpoint) as it,
        aiohttp.ClientSession(headers={"Authorization": f"Bearer {key}"}) as client,
    ):
        await listening(it)
        await eventually(lambda: it.found("view synced"), timeout_seconds=10)
        store = await EtcdStore.connect(etcd.settings)
        page = await store.list(keys.LIVE_ROUTERS)
        await store.close()
        record = records_pb2.RouterRecord.FromString(page.items[0].value)
        assert record.url == it.url
        etcd.kill()
        async with client.post(f"{it.url}/v1/completions", json={"model": DEPLOYMENT}) as response:
            assert response.status == 200
        engine.behaviour = streams([b"data: 1\n\n", b"data: [DONE]\n\n"], gate=gate)
        async with client.post(
            f"{it.url}/v1/completions", json={"model": DEPLOYMENT, "stream": True}
        ) as response:
            await response.content.readany()
            it.process.terminate()
            await eventually(lambda: it.found("router stops accepting"))
            with pytest.raises(aiohttp.ClientConnectorError):
                async with aiohttp.ClientSession() as late:
                    await late.get(f"{it.url}/health")
            gate.set()
            assert await response.content.read() == b"data: [DONE]\n\n"
        assert await it.exit_code() == 0
        (first, second) = it.found("request")
        assert first["status"] == 200
        assert (first["endpoint"], first["node"]) == ("chat-0", "node-1")
        assert (first["attempts"], second["stream"]) == (1, True)
        assert first["request_id"] == engine.requests[0].headers["x-request-id"]
        assert key not in it.text
        assert hash_secret(key) not in it.text


async def test_drain_period_is_bounded() -> None:
    async with (
        FakeEngine(silent) as engine,
        etcd_with_deployment(engine.url) as (etcd, key),
        router("--port", "0", "--etcd-endpoints", etcd.endpoint, "--drain-seconds", "0.2") as it,
        aiohttp.ClientSession(headers={"Authorization": f"Bearer {key}"}) as client,
    ):
        await listening(it)
        await eventually(lambda: it.found("view synced"), timeout_seconds=10)
        request = asyncio.ensure_future(
            client.post(f"{it.url}/v1/completions", json={"model": DEPLOYMENT}).__aenter__()
        )
        await eventually(lambda: engine.active == 1)
        it.process.terminate()
        assert await it.exit_code() == 0
        assert it.found("drain period is over, requests are cut off")
        with pytest.raises(aiohttp.ClientError):
            await request
        await eventually(lambda: engine.aborted == 1)


async def test_workers_share_the_port_are_restarted_and_stop_together() -> None:
    async with (
        FakeEngine(answers(200, b'{"choices":[]}')) as engine,
        etcd_with_deployment(engine.url) as (etcd, key),
        router("--port", "0", "--workers", "2", "--etcd-endpoints", etcd.endpoint) as it,
        aiohttp.ClientSession(headers={"Authorization": f"Bearer {key}"}) as client,
    ):
        await listening(it, 2)
        await eventually(lambda: len(it.found("view synced")) == 2, timeout_seconds=20)
        assert len({line["url"] for line in it.found("router listens")}) == 1

        async def ask() -> int:
            # A connection of its own each: the kernel spreads connections, not requests.
            async with (
                aiohttp.ClientSession(headers=client.headers) as fresh,
                fresh.post(f"{it.url}/v1/completions", json={"model": DEPLOYMENT}) as response,
            ):
                return response.status

        assert [await ask() for _ in range(12)] == [200] * 12

        async def counted() -> bool:
            async with client.get(f"{it.url}/metrics") as response:
                page = await response.text()
            series = 'millrace_router_requests_total{reason="ok",route="/v1/completions"'
            (count,) = [line for line in page.splitlines() if line.startswith(series)]
            return float(count.rsplit(" ", 1)[1]) == 12

        # The worker that answers has counted everything; the other writes its counts once a second.
        await eventually(counted, timeout_seconds=5)
        victim = int(it.found("worker started")[0]["pid"])
        os.kill(victim, signal.SIGKILL)
        await listening(it, 3)
        await eventually(lambda: len(it.found("view synced")) == 3, timeout_seconds=20)
        assert it.found("worker died, starting another")[0]["pid"] == victim
        assert [await ask() for _ in range(12)] == [200] * 12
        it.process.terminate()
        assert await it.exit_code() == 0
        assert len(it.found("router stopped")) == 2


async def test_any_worker_tells_why(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("admin-token-of-this-test\n")
    token.chmod(0o600)
    arguments = ("--port", "0", "--workers", "2", "--admin-token-file", str(token))
    async with (
        FakeEngine(answers(200, b'{"choices":[]}')) as engine,
        etcd_with_deployment(engine.url) as (etcd, key),
        router(*arguments, "--etcd-endpoints", etcd.endpoint) as it,
        aiohttp.ClientSession(headers={"Authorization": "Bearer admin-token-of-this-test"}) as operator,
    ):
        await listening(it, 2)
        await eventually(lambda: len(it.found("view synced")) == 2, timeout_seconds=20)

        async def ask(request_id: str) -> None:
            headers = {"Authorization": f"Bearer {key}", "x-request-id": request_id}
            async with (
                aiohttp.ClientSession(headers=headers) as fresh,
                fresh.post(f"{it.url}/v1/completions", json={"model": DEPLOYMENT}) as response,
            ):
                assert response.headers["x-millrace-reason"] == "only-endpoint"
                await response.read()

        for number in range(12):
            await ask(f"request-{number}")
        # One connection, hence one worker, answers for both.
        for number in range(12):
            async with operator.get(f"{it.url}/debug/decisions/request-{number}") as response:
                document = await response.json()
                assert (response.status, document["request_id"]) == (200, f"request-{number}")
                assert document["choices"][0]["why"] == "only-endpoint"
        assert len({line["pid"] for line in it.found("worker started")}) == 2


async def test_orphaned_workers_stop() -> None:
    async with router("--port", "0", "--workers", "2", "--etcd-endpoints", NO_ETCD) as it:
        await listening(it, 2)
        it.process.kill()
        await it.exit_code()
        await eventually(lambda: len(it.found("router stopped")) == 2, timeout_seconds=15)
