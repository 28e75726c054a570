"""A small HTTP/1.1 server on asyncio's protocols, for one purpose: to be listening at once.

In: bytes of connections and a handler. Out: parsed requests to the handler, its answers as bytes.
Importing aiohttp costs twice the simulator's whole start-up budget, so the front is written by
hand: keep-alive, content-length and chunked bodies, `Expect: 100-continue`, chunked streaming
with back-pressure, and cancellation of the handler as soon as its client is gone.
Must not: know routes, JSON or the engine; read past the limits below.
"""

import asyncio
import http
import json
import sys
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field

MAX_HEAD_BYTES = 64 * 1024  # as uvicorn's h11 limit
MAX_BODY_BYTES = 64 * 1024 * 1024  # far above any prompt that fits a context
CLOSE_SECONDS = 0.5  # a client that does not read must not hold the process
KEEP_ALIVE_SECONDS = 5.0  # vLLM's VLLM_HTTP_TIMEOUT_KEEP_ALIVE
ACCEPT_BACKLOG = 2048  # uvicorn's


class MalformedRequestError(Exception):
    """Bytes that are no HTTP request, or one beyond the limits; carries the status to answer."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class HttpRequest:
    """One request; header names in lower case."""

    method: str
    path: str
    headers: Mapping[str, str]
    version: str
    body: bytes = b""
    query: str = ""


@dataclass(frozen=True)
class HttpResponse:
    """One complete answer."""

    status: int
    body: bytes = b""
    content_type: str = "application/json"
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class StreamResponse:
    """An answer that comes in pieces; the generator is closed when the client leaves."""

    pieces: AsyncGenerator[bytes, None]
    content_type: str = "text/event-stream; charset=utf-8"


Handler = Callable[[HttpRequest], Awaitable[HttpResponse | StreamResponse]]


def json_response(status: int, content: object) -> HttpResponse:
    """An answer with a JSON body."""
    body = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
    return HttpResponse(status, body.encode("utf-8", "backslashreplace"))


def _parse_head(head: bytes) -> HttpRequest:
    lines = head.decode("latin-1").split("\r\n")
    parts = lines[0].split(" ")
    if len(parts) != 3 or not parts[2].startswith("HTTP/1."):
        raise MalformedRequestError(400, "Invalid HTTP request received.")
    headers: dict[str, str] = {}
    for line in lines[1:]:
        name, colon, value = line.partition(":")
        if not colon or not name or name != name.strip():
            raise MalformedRequestError(400, "Invalid HTTP request received.")
        headers[name.lower()] = value.strip()
    path, _, query = parts[1].partition("?")
    return HttpRequest(parts[0], path, headers, parts[2], query=query)


class _Reader:
    """Takes requests out of a connection's bytes."""

    def __init__(self) -> None:
        self.buffer = bytearray()
        self._head: HttpRequest | None = None
        self._length: int | None = None
        self._body = bytearray()
        self.wants_continue = False

    def next_request(self) -> HttpRequest | None:
        """The next complete request, None while bytes are missing.

        Raises:
            MalformedRequestError: The bytes are no request within the limits.
        """
        if self._head is None and not self._read_head():
            return None
        if not (self._read_chunks() if self._length is None else self._read_sized()):
            return None
        head = self._head
        if head is None:
            raise MalformedRequestError(400, "Invalid HTTP request received.")
        body = bytes(self._body)
        self._head = None
        self._body = bytearray()
        self.wants_continue = False
        return HttpRequest(head.method, head.path, head.headers, head.version, body, head.query)

    def _read_head(self) -> bool:
        while self.buffer[:2] == b"\r\n":
            del self.buffer[:2]
        end = self.buffer.find(b"\r\n\r\n", 0, MAX_HEAD_BYTES)
        if end < 0:
            if len(self.buffer) >= MAX_HEAD_BYTES:
                raise MalformedRequestError(431, "Request header fields too large.")
            return False
        head = _parse_head(bytes(self.buffer[:end]))
        del self.buffer[: end + 4]
        self._head = head
        if "transfer-encoding" in head.headers:
            if head.headers["transfer-encoding"].lower() != "chunked":
                raise MalformedRequestError(501, "Unsupported transfer encoding.")
            self._length = None
        else:
            text = head.headers.get("content-length", "0")
            if not (text.isascii() and text.isdigit()):
                raise MalformedRequestError(400, "Invalid content length.")
            self._length = int(text)
            if self._length > MAX_BODY_BYTES:
                raise MalformedRequestError(413, "Request body too large.")
        self.wants_continue = head.headers.get("expect", "").lower() == "100-continue"
        return True

    def _read_sized(self) -> bool:
        length = self._length or 0
        if len(self.buffer) < length:
            return False
        self._body += self.buffer[:length]
        del self.buffer[:length]
        return True

    def _read_chunks(self) -> bool:
        while True:
            line_end = self.buffer.find(b"\r\n", 0, 1024)
            if line_end < 0:
                if len(self.buffer) >= 1024:
                    raise MalformedRequestError(400, "Invalid chunk.")
                return False
            try:
                size = int(bytes(self.buffer[:line_end]).partition(b";")[0], 16)
            except ValueError as error:
                raise MalformedRequestError(400, "Invalid chunk.") from error
            if size < 0 or len(self._body) + size > MAX_BODY_BYTES:
                raise MalformedRequestError(413, "Request body too large.")
            if len(self.buffer) < line_end + 2 + size + 2:
                return False
            start = line_end + 2
            self._body += self.buffer[start : start + size]
            del self.buffer[: start + size + 2]
            if size == 0:
                return True


class _Connection(asyncio.Protocol):
    """One client connection; serves its requests one after the other."""

    def __init__(self, server: "HttpServer") -> None:
        self._server = server
        self._reader = _Reader()
        self._transport: asyncio.Transport | None = None
        self._task: asyncio.Task[None] | None = None
        self._idle: asyncio.TimerHandle | None = None
        self._writable = asyncio.Event()
        self._writable.set()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        if not isinstance(transport, asyncio.Transport):
            raise TypeError("a stream transport is needed")
        self._transport = transport
        self._server.opened(self)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - asyncio's signature
        self._transport = None
        self._cancel_idle()
        if self._task is not None:
            self._task.cancel()
        self._server.changed()

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    def data_received(self, data: bytes) -> None:
        self._reader.buffer += data
        if self._task is None:
            self._cancel_idle()
            self._advance()
        elif len(self._reader.buffer) > MAX_BODY_BYTES + MAX_HEAD_BYTES:
            self.close()

    def close(self) -> None:
        """Closes after what has been written."""
        if self._transport is not None:
            self._transport.close()

    @property
    def busy(self) -> bool:
        """Whether a request is being answered."""
        return self._task is not None

    @property
    def gone(self) -> bool:
        """Whether nothing is left of it: no socket and no request."""
        return self._transport is None and self._task is None

    def abandon(self) -> None:
        """Closes without waiting for the client to read; losing it cancels its request."""
        if self._transport is not None:
            self._transport.abort()

    def _cancel_idle(self) -> None:
        if self._idle is not None:
            self._idle.cancel()
            self._idle = None

    def _write(self, data: bytes) -> None:
        if self._transport is not None:
            self._transport.write(data)

    def _advance(self) -> None:
        try:
            request = self._reader.next_request()
        except MalformedRequestError as error:
            answer = HttpResponse(error.status, str(error).encode(), "text/plain; charset=utf-8")
            self._write(_encode(answer, keep=False))
            self.close()
            return
        if request is None:
            if self._reader.wants_continue:
                self._reader.wants_continue = False
                self._write(b"HTTP/1.1 100 Continue\r\n\r\n")
            return
        self._task = asyncio.get_running_loop().create_task(
            self._serve(request), name=f"simulator {request.method} {request.path}"
        )
        self._task.add_done_callback(self._served)

    def _served(self, task: "asyncio.Task[None]") -> None:
        self._task = None
        self._server.changed()
        if not task.cancelled() and task.exception() is not None:
            # The handler turns every failure of a request into an answer, so this is a bug of
            # the server itself: the loop's handler writes it to standard error.
            task.get_loop().call_exception_handler(
                {"message": "the server failed", "exception": task.exception(), "task": task}
            )
            self.close()
        if self._transport is None or self._transport.is_closing():
            return
        if self._server.closing:
            self.close()
            return
        self._idle = task.get_loop().call_later(KEEP_ALIVE_SECONDS, self.close)
        if self._reader.buffer:
            self._cancel_idle()
            self._advance()

    async def _serve(self, request: HttpRequest) -> None:
        response = await self._server.answer(request)
        connection = request.headers.get("connection", "").lower()
        keep = request.version == "HTTP/1.1" and connection != "close"
        keep = keep and not self._server.closing
        if isinstance(response, HttpResponse):
            self._write(_encode(response, keep=keep))
        else:
            chunked = request.version == "HTTP/1.1"
            await self._stream(response, keep=keep, chunked=chunked)
        if not keep:
            self.close()

    async def _stream(self, response: StreamResponse, *, keep: bool, chunked: bool) -> None:
        encoding = "transfer-encoding: chunked\r\n" if chunked else ""
        head = (
            f"HTTP/1.1 200 OK\r\ncontent-type: {response.content_type}\r\n{encoding}"
            f"connection: {'keep-alive' if keep else 'close'}\r\n\r\n"
        )
        self._write(head.encode("latin-1"))
        async with aclosing(response.pieces) as pieces:
            async for data in pieces:
                self._write(b"%x\r\n%b\r\n" % (len(data), data) if chunked else data)
                await self._writable.wait()
        if chunked:
            self._write(b"0\r\n\r\n")


def _encode(response: HttpResponse, *, keep: bool) -> bytes:
    reason = http.HTTPStatus(response.status).phrase
    lines = [f"HTTP/1.1 {response.status} {reason}"]
    if response.body:
        lines.append(f"content-type: {response.content_type}")
    lines.append(f"content-length: {len(response.body)}")
    lines.append(f"connection: {'keep-alive' if keep else 'close'}")
    lines += [f"{name}: {value}" for name, value in response.headers.items()]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + response.body


class HttpServer:
    """Listens, and hands every request to one handler."""

    def __init__(self, handler: Handler) -> None:
        self._handler = handler
        self._server: asyncio.Server | None = None
        self._connections: set[_Connection] = set()
        self._change = asyncio.Event()
        self.closing = False

    def opened(self, connection: _Connection) -> None:
        """Takes note of a new connection."""
        self._connections.add(connection)

    def changed(self) -> None:
        """Forgets connections that are gone and wakes whoever waits for them."""
        self._connections = {item for item in self._connections if not item.gone}
        self._change.set()

    async def start(self, host: str, port: int) -> int:
        """Opens the port and returns its number.

        Raises:
            OSError: The address cannot be bound.
        """
        self._server = await asyncio.get_running_loop().create_server(
            lambda: _Connection(self), host, port, backlog=ACCEPT_BACKLOG
        )
        number = self._server.sockets[0].getsockname()[1]
        return int(number)

    async def answer(self, request: HttpRequest) -> HttpResponse | StreamResponse:
        """The handler's answer; a failing handler is an answer with status 500."""
        try:
            return await self._handler(request)
        except Exception as error:  # noqa: BLE001 - one bad request must not end the server
            sys.stderr.write(f"ERROR: {request.method} {request.path}: {error!r}\n")
            return HttpResponse(500, b"Internal Server Error", "text/plain; charset=utf-8")

    async def wait_until_idle(self) -> None:
        """Returns once no request is being answered."""
        await self._wait_until(lambda: not any(item.busy for item in self._connections))

    async def close(self) -> None:
        """Cancels what is being answered and waits until every connection is gone."""
        self.closing = True
        await self._stop_accepting()
        for connection in self._connections:
            if connection.busy:
                connection.abandon()
            else:
                connection.close()
        try:
            async with asyncio.timeout(CLOSE_SECONDS):
                await self._wait_until(lambda: not self._connections)
        except TimeoutError:
            for connection in self._connections:
                connection.abandon()
            await self._wait_until(lambda: not self._connections)

    async def _stop_accepting(self) -> None:
        if self._server is None:
            return
        loop = asyncio.get_running_loop()
        for each in self._server.sockets:
            loop.remove_reader(each.fileno())
        # asyncio makes a transport one turn after it accepted, and leaks the socket of a connection
        # whose server is closed by then: its client would wait for ever.
        for _ in range(3):
            await asyncio.sleep(0)
        self._server.close()

    async def _wait_until(self, holds: Callable[[], bool]) -> None:
        while not holds():
            self._change.clear()
            await self._change.wait()
