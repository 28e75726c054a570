"""An engine that misbehaves on command: a raw HTTP server whose every byte the test decides.

In come requests, which are kept; out goes what the current behaviour writes. `aborted` counts requests
whose client hung up while they were being answered.
"""

import asyncio
import json
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Self


@dataclass(frozen=True)
class SeenRequest:
    method: str
    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class Exchange:
    """One request on its connection; behaviours write their answer to it."""

    request: SeenRequest
    writer: asyncio.StreamWriter
    hung_up: asyncio.Event
    keep_alive: bool = True

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    def abort(self) -> None:
        """Sends a reset."""
        self.writer.transport.abort()
        self.keep_alive = False

    def hang_up(self) -> None:
        """Closes in good order."""
        self.writer.close()
        self.keep_alive = False


Behaviour = Callable[[Exchange], Awaitable[None]]


@dataclass
class FakeEngine:
    behaviour: Behaviour
    requests: list[SeenRequest] = field(default_factory=list)
    active: int = 0
    aborted: int = 0
    connections: int = 0
    port: int = 0
    _server: asyncio.Server | None = None
    _tasks: set["asyncio.Task[None]"] = field(default_factory=set)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.die()

    async def die(self) -> None:
        """Stops listening and breaks every connection, as a killed process does."""
        if self._server is not None:
            self._server.close()
            self._server = None
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        task = asyncio.create_task(self._serve(reader, writer), name="fake-engine-connection")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            with suppress(ConnectionError, asyncio.IncompleteReadError):
                while await self._exchange(reader, writer):
                    pass
        finally:
            writer.transport.abort()

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        first, *lines = head.rstrip("\r\n").split("\r\n")
        method, path, _ = first.split(" ")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        body = await reader.readexactly(int(headers.get("content-length", "0")))
        seen = SeenRequest(method, path, headers, body)
        self.requests.append(seen)
        exchange = Exchange(seen, writer, asyncio.Event())
        watcher = asyncio.create_task(_watch(reader, exchange.hung_up), name="fake-engine-watch")
        self.active += 1
        try:
            await self.behaviour(exchange)
        except ConnectionError:
            exchange.hung_up.set()
        finally:
            self.active -= 1
            watcher.cancel()
            await asyncio.gather(watcher, return_exceptions=True)
            if exchange.hung_up.is_set():
                self.aborted += 1
        return exchange.keep_alive and not exchange.hung_up.is_set()


async def _watch(reader: asyncio.StreamReader, hung_up: asyncio.Event) -> None:
    """Notices that the client closed; clients here never send the next request early."""
    # Peeking at the buffer would race with the next request, so only the end is looked for.
    while not reader.at_eof() and reader.exception() is None:  # noqa: ASYNC110 - a reader has no event for its end
        await asyncio.sleep(0.005)
    hung_up.set()


def response_head(status: int, headers: dict[str, str]) -> bytes:
    lines = [f"HTTP/1.1 {status} Status", *(f"{name}: {value}" for name, value in headers.items())]
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


def answers(status: int, body: bytes, content_type: str = "application/json") -> Behaviour:
    """Answers in one piece."""

    async def behave(exchange: Exchange) -> None:
        headers = {"content-type": content_type, "content-length": str(len(body)), "server": "fake"}
        await exchange.send(response_head(status, headers) + body)

    return behave


def chunk(data: bytes) -> bytes:
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


STREAM_HEAD = response_head(
    200, {"content-type": "text/event-stream; charset=utf-8", "transfer-encoding": "chunked"}
)


def streams(pieces: Sequence[bytes], *, gate: asyncio.Event | None = None) -> Behaviour:
    """Streams pieces; after the first it waits for the gate, if there is one."""

    async def behave(exchange: Exchange) -> None:
        await exchange.send(STREAM_HEAD)
        for number, piece in enumerate(pieces):
            if number == 1 and gate is not None:
                await first_of(gate.wait(), exchange.hung_up.wait())
                if exchange.hung_up.is_set():
                    return
            await exchange.send(chunk(piece))
        await exchange.send(b"0\r\n\r\n")

    return behave


async def silent(exchange: Exchange) -> None:
    """Takes the request and never answers."""
    await exchange.hung_up.wait()


async def resets(exchange: Exchange) -> None:
    """Takes the request and resets the connection."""
    exchange.abort()


async def hangs_up(exchange: Exchange) -> None:
    """Takes the request and closes the connection."""
    exchange.hang_up()


def breaks_after(first: bytes, *, content_length: int | None = None) -> Behaviour:
    """Sends the beginning of an answer and resets: a stream, or a body of a known length."""

    async def behave(exchange: Exchange) -> None:
        if content_length is None:
            await exchange.send(STREAM_HEAD + chunk(first))
        else:
            headers = {"content-type": "application/json", "content-length": str(content_length)}
            await exchange.send(response_head(200, headers) + first)
        # The beginning must have been read before the reset, which discards what has not.
        await asyncio.sleep(0.05)
        exchange.abort()

    return behave


async def first_of(*waits: Awaitable[Any]) -> None:
    tasks = [asyncio.ensure_future(each) for each in waits]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
