"""The hot path on real sockets: slow and early bodies, pipelining, answers framed in every way, shutdown."""

import asyncio
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager

import pytest

from tests.support.fake_engine import (
    Behaviour,
    Exchange,
    FakeEngine,
    answers,
    chunk,
    response_head,
    silent,
    streams,
)
from tests.support.router_cluster import Cluster, cluster
from tests.support.waiting import eventually
from tests.support.wire_fuzz import BODY, request

OK = b'{"choices": []}'


@asynccontextmanager
async def _connection(it: Cluster) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    host, port = it.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        yield reader, writer
    finally:
        writer.transport.abort()


async def _answer(reader: asyncio.StreamReader) -> tuple[int, dict[str, str], bytes]:
    """Reads one answer by its own framing."""
    async with asyncio.timeout(5):
        first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode().strip().split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        body = b""
        if headers.get("transfer-encoding") == "chunked":
            while size := int(await reader.readline(), 16):
                body += await reader.readexactly(size)
                await reader.readexactly(2)
            await reader.readexactly(2)
        else:
            body = await reader.readexactly(int(headers.get("content-length", "0")))
    return int(first.split(" ")[1]), headers, body


def _writes(pieces: Iterable[bytes], *, then_closes: bool = False) -> Behaviour:
    async def behave(exchange: Exchange) -> None:
        for piece in pieces:
            await exchange.send(piece)
            await asyncio.sleep(0.001)
        if then_closes:
            exchange.hang_up()

    return behave


async def test_requests_of_one_connection_are_served_in_order() -> None:
    async with FakeEngine(answers(200, OK)) as engine, cluster(urls=[engine.url]) as it:
        async with _connection(it) as (reader, writer):
            writer.write(request(it.api_key) * 40)
            for _ in range(40):
                status, _, body = await _answer(reader)
                assert (status, body) == (200, OK)
        assert len(engine.requests) == 40
        assert engine.connections == 1


async def test_a_body_that_comes_byte_by_byte() -> None:
    async with FakeEngine(answers(200, OK)) as engine, cluster(urls=[engine.url]) as it:
        async with _connection(it) as (reader, writer):
            for byte in request(it.api_key):
                writer.write(bytes([byte]))
                await asyncio.sleep(0)
            assert (await _answer(reader))[0] == 200
        assert engine.requests[0].body == BODY


async def test_a_refused_body_is_read_to_its_end_so_that_the_refusal_arrives() -> None:
    async with FakeEngine(answers(200, OK)) as engine, cluster(urls=[engine.url]) as it:
        body = b" " * 3_000_000
        async with _connection(it) as (reader, writer):
            writer.write(request("sk-wrong", body=body)[:-2_000_000])
            assert (await _answer(reader))[0] == 401
            writer.write(body[:2_000_000] + request(it.api_key))
            assert (await _answer(reader))[0] == 200
        assert len(engine.requests) == 1


async def test_other_routes_follow_on_the_same_connection() -> None:
    async with (
        FakeEngine(answers(200, OK)) as engine,
        cluster(urls=[engine.url]) as it,
        _connection(it) as (reader, writer),
    ):
        health = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
        writer.write(request(it.api_key) + health + request(it.api_key))
        assert (await _answer(reader))[2] == OK
        assert b'"status":"ok"' in (await _answer(reader))[2]
        assert (await _answer(reader))[2] == OK


@pytest.mark.parametrize(
    ("pieces", "closes"),
    [
        pytest.param([b"HTTP/1.1 200 OK\r\nContent-Le", b"ngth: 15\r\n\r\n", OK[:3], OK[3:]], False,
                     id="length"),
        pytest.param([b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early\r\nLink: x\r\n\r\n"
                      b"HTTP/1.1 200 OK\r\nContent-Length: 15\r\n\r\n" + OK], False, id="interim"),
        pytest.param([b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"5\r\n" + OK[:5], b"\r",
                      b"\na;x=1\r\n" + OK[5:] + b"\r\n0\r\nX-Trailer: 1\r\n\r\n"], False, id="chunks"),
        pytest.param([b"HTTP/1.0 200 OK\r\n\r\n", OK[:5], OK[5:]], True, id="until-close"),
        pytest.param([b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 15\r\n\r\n" + OK], True,
                     id="length-and-close"),
    ],
)  # fmt: skip
async def test_answers_framed_in_every_way(pieces: list[bytes], closes: bool) -> None:
    behaviour = _writes(pieces, then_closes=closes)
    async with FakeEngine(behaviour) as engine, cluster(urls=[engine.url]) as it:
        async with _connection(it) as (reader, writer):
            for _ in range(3):
                writer.write(request(it.api_key))
                status, _, body = await _answer(reader)
                assert (status, body) == (200, OK)
        assert engine.connections == (3 if closes else 1)


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 15\r\nContent-Length: 16\r\n\r\n" + OK,
        b"HTTP/1.1 200 OK\r\nContent-Length: 15\r\nTransfer-Encoding: chunked\r\n\r\n" + OK,
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n+5\r\nhello\r\n0\r\n\r\n",
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n\r\n",
        b"SSH-2.0-OpenSSH\r\n\r\n",
    ],
)
async def test_an_answer_that_cannot_be_framed_fails_over(answer: bytes) -> None:
    behaviour = _writes([answer])
    async with (
        FakeEngine(behaviour) as bad,
        FakeEngine(answers(200, OK)) as good,
        cluster(urls=[bad.url, good.url]) as it,
    ):
        async with it.chat() as response:
            assert (response.status, response.headers["x-millrace-endpoint"]) == (200, "chat-1")
        assert await it.metric('millrace_router_retries_total{cause="disconnected"}') == 1


async def test_bytes_after_an_answer_never_become_the_next_one() -> None:
    other = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nother"
    behaviour = _writes([response_head(200, {"content-length": "15"}) + OK + other])
    async with FakeEngine(behaviour) as engine, cluster(urls=[engine.url]) as it:
        for _ in range(3):
            async with it.chat() as response:
                assert await response.read() == OK
        assert engine.connections == 3


async def test_events_reach_the_client_as_the_chunks_that_they_came_in() -> None:
    events = [b"data: %d\n\n" % number for number in range(50)]
    async with FakeEngine(streams(events)) as engine, cluster(urls=[engine.url]) as it:
        async with _connection(it) as (reader, writer):
            writer.write(request(it.api_key))
            _, headers, body = await _answer(reader)
        assert headers["transfer-encoding"] == "chunked"
        assert body == b"".join(events)


async def test_what_is_served_ends_before_its_connection_closes() -> None:
    gate = asyncio.Event()
    async with (
        FakeEngine(streams([b"data: 1\n\n", b"data: 2\n\n"], gate=gate)) as engine,
        cluster(urls=[engine.url]) as it,
        _connection(it) as (reader, writer),
    ):
        writer.write(request(it.api_key))
        await eventually(lambda: engine.active == 1)
        assert it.runner.server is not None
        for handler in it.runner.server.connections:
            handler.close()
        gate.set()
        assert (await _answer(reader))[2] == b"data: 1\n\ndata: 2\n\n"
        assert await reader.read() == b""


async def test_a_request_that_does_not_end_is_cut_off_at_shutdown() -> None:
    async with FakeEngine(silent) as engine, cluster(urls=[engine.url]) as it:
        async with _connection(it) as (reader, writer):
            writer.write(request(it.api_key))
            await eventually(lambda: engine.active == 1)
            assert it.runner.server is not None
            for handler in it.runner.server.connections:
                await handler.shutdown(0.01)
            assert await reader.read() == b""
        await eventually(lambda: it.router.serving.in_flight == 0 and engine.aborted == 1)


async def test_a_first_chunk_with_the_head_is_not_held_back() -> None:
    gate = asyncio.Event()

    async def behave(exchange: Exchange) -> None:
        head = response_head(200, {"content-type": "text/event-stream", "transfer-encoding": "chunked"})
        await exchange.send(head + chunk(b"data: 1\n\n"))
        await gate.wait()
        await exchange.send(b"0\r\n\r\n")

    async with (
        FakeEngine(behave) as engine,
        cluster(urls=[engine.url]) as it,
        it.chat(stream=True) as response,
    ):
        async with asyncio.timeout(5):
            assert await response.content.readany() == b"data: 1\n\n"
        gate.set()
        assert await response.read() == b""
