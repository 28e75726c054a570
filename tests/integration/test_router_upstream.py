"""Connections to engines: by name, over TLS, kept and not kept, and clients that do not take what is sent."""

import asyncio
import shutil
import ssl
import subprocess
from pathlib import Path

import pytest

from tests.support.fake_engine import Exchange, FakeEngine, answers, chunk, response_head
from tests.support.router_cluster import cluster
from tests.support.waiting import eventually
from tests.support.wire_fuzz import request

OK = b'{"choices": []}'


async def test_an_engine_named_by_host_is_reached() -> None:
    async with (
        FakeEngine(answers(200, OK)) as engine,
        cluster(urls=[f"http://localhost:{engine.port}"]) as it,
    ):
        for _ in range(2):
            async with it.chat() as response:
                assert response.status == 200
        assert engine.requests[0].headers["host"] == f"localhost:{engine.port}"
        assert engine.connections == 1


@pytest.mark.parametrize(
    "url", ["http://no-such-host.invalid", "ftp://127.0.0.1", "http://:80", "http://a b"]
)
async def test_an_endpoint_that_leads_nowhere_is_passed_over(url: str) -> None:
    async with FakeEngine(answers(200, OK)) as engine, cluster(urls=[url, engine.url]) as it:
        async with it.chat() as response:
            assert (response.status, response.headers["x-millrace-endpoint"]) == (200, "chat-1")
        assert await it.metric('millrace_router_retries_total{cause="connect_failed"}') == 1


@pytest.mark.skipif(shutil.which("openssl") is None, reason="makes its certificate with openssl")
async def test_an_https_endpoint_is_verified_and_served(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    command = [
        *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=localhost"),
        *("-addext", "subjectAltName=DNS:localhost", "-keyout", str(key), "-out", str(certificate)),
    ]
    await asyncio.to_thread(subprocess.run, command, check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
        await reader.readexactly(length)
        writer.write(response_head(200, {"content-length": str(len(OK))}) + OK)
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
    url = f"https://localhost:{server.sockets[0].getsockname()[1]}"
    try:
        async with cluster(urls=[url]) as it, it.chat() as response:
            assert response.status == 503  # nobody vouches for the certificate
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        async with cluster(urls=[url]) as it, it.chat() as response:
            assert (response.status, await response.read()) == (200, OK)
    finally:
        server.close()
        await server.wait_closed()


async def test_a_client_that_takes_nothing_is_cut_off() -> None:
    piece = b"data: " + b"x" * 60_000 + b"\n\n"

    async def flood(exchange: Exchange) -> None:
        await exchange.send(
            response_head(200, {"content-type": "text/event-stream", "transfer-encoding": "chunked"})
        )
        while not exchange.hung_up.is_set():
            await exchange.send(chunk(piece))

    async with FakeEngine(flood) as engine, cluster(urls=[engine.url], idle_timeout_seconds=0.3) as it:
        host, port = it.url.removeprefix("http://").split(":")
        _, writer = await asyncio.open_connection(host, int(port), limit=1024)
        writer.write(request(it.api_key))
        await eventually(lambda: engine.aborted == 1)
        writer.transport.abort()
        await eventually(lambda: it.router.serving.in_flight == 0)
        assert await it.metric('millrace_router_requests_total{reason="client_stalled"') == 1
        assert not it.router.director.health.is_ejected(it.router.source.view.endpoints[0])
