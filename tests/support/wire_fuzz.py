"""Sends the same raw bytes to the hot path and to plain aiohttp, and compares what becomes of them.

    python -m tests.support.wire_fuzz --seconds 60 --seed 1

In come byte strings and where to cut them; out comes, for each of the two servers, an `Account`: the
status class of every answer, whether the connection was closed, and every request that the engine saw. The
two must be equal: a difference is a request that the hot path judged in its own way. Must not depend on
timing: both servers, the engine and the client run on one event loop, and an exchange is over when nothing
moves.

Bytes are always cut where a request seems to end, because aiohttp drops the good requests of a packet in
which a bad one follows, and answers them where it follows in a packet of its own; the hot path always
answers them.
"""

import argparse
import asyncio
import random
import re
import socket
import sys
import time
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from itertools import pairwise

from tests.support.fake_engine import FakeEngine, SeenRequest, answers
from tests.support.router_cluster import Cluster, cluster

# Turns of the event loop without a byte, after which nothing will come any more.
_QUIET_TURNS = 40
_ACCEPT_TURNS = 8
_STATUS = re.compile(rb"HTTP/[0-9]\.[0-9] ([1-5])[0-9][0-9] ")
_LENGTH = re.compile(rb"content-length: *([0-9]+)", re.IGNORECASE)
_CHUNKED = re.compile(rb"transfer-encoding:[ \t]*chunked", re.IGNORECASE)
_OWN_HEADERS = ("x-request-id", "traceparent", "host", "content-length")

BODY = b'{"model":"chat","messages":[{"role":"user","content":"hi"}]}'


@dataclass(frozen=True)
class Account:
    """What became of some bytes.

    Attributes:
        status_classes: Of the answers, in order: 2, 4, 5.
        closed: The server ended the connection.
        seen: What the engine got: path, body, headers but those that the router makes.
    """

    status_classes: tuple[int, ...]
    closed: bool
    seen: tuple[tuple[str, bytes, tuple[tuple[str, str], ...]], ...]


@dataclass
class Side:
    """One of the two servers, with an engine of its own."""

    cluster: Cluster
    engine: FakeEngine

    async def send(self, pieces: Sequence[bytes]) -> Account:
        """Sends pieces on one connection and waits until nothing moves."""
        self.engine.requests.clear()
        host, port = self.cluster.url.removeprefix("http://").split(":")
        # A bare socket: a stream would drop what has come when sending fails.
        with socket.create_connection((host, int(port))) as connection:
            connection.setblocking(False)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            received, closed = b"", False
            # Until the server has accepted, it would read several pieces as one.
            for _ in range(_ACCEPT_TURNS):
                await asyncio.sleep(0)
            for piece in pieces:
                with suppress(ConnectionError):
                    connection.send(piece)
                for _ in range(3):
                    await asyncio.sleep(0)
            quiet = 0
            while not closed and (quiet < _QUIET_TURNS or self.engine.active):
                await asyncio.sleep(0)
                quiet += 1
                try:
                    data = connection.recv(65_536)
                except BlockingIOError:
                    continue
                except ConnectionError:
                    data = b""
                closed = not data
                received += data
                quiet = 0
        for _ in range(3):
            await asyncio.sleep(0)
        return Account(_status_classes(received), closed, tuple(map(_seen, self.engine.requests)))


def _seen(request: SeenRequest) -> tuple[str, bytes, tuple[tuple[str, str], ...]]:
    kept = sorted((name, value) for name, value in request.headers.items() if name not in _OWN_HEADERS)
    return request.path, request.body, tuple(kept)


def _status_classes(received: bytes) -> tuple[int, ...]:
    classes = []
    while match := _STATUS.match(received):
        classes.append(int(match[1]))
        end = received.find(b"\r\n\r\n") + 4
        length = _LENGTH.search(received, 0, end)
        # Interim answers have no body; every other answer here has a length.
        received = received[end + (int(length[1]) if length else 0) :]
    assert not received, received[:200]
    return tuple(classes)


@asynccontextmanager
async def two_sides() -> AsyncIterator[tuple[Side, Side]]:
    """Runs the hot path and plain aiohttp beside each other, with the same API key."""
    ok = answers(200, b'{"choices": []}')
    async with (
        FakeEngine(ok) as one,
        FakeEngine(ok) as two,
        cluster(urls=[one.url], request_body_bytes_max=2048) as hot,
        cluster(urls=[two.url], request_body_bytes_max=2048, ordinary=True) as plain,
    ):
        await plain.add_key(hot.api_key)
        yield Side(hot, one), Side(plain, two)


def request(
    key: str,
    *,
    line: bytes = b"POST /v1/chat/completions HTTP/1.1",
    headers: Sequence[bytes] = (),
    body: bytes = BODY,
    length: bytes | None = None,
) -> bytes:
    """Builds a request; `headers` are whole lines beside host, key and length."""
    lines = [line, b"Host: router", b"Authorization: Bearer " + key.encode(), *headers]
    if length != b"":
        lines.append(b"Content-Length: " + (b"%d" % len(body) if length is None else length))
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


# Whole lines that change what a request means, or look as if they did.
ODD_HEADERS = (
    b"Content-Length: 5", b"Content-Length: +5", b"Content-Length : 5", b"content-length: 0",
    b"Transfer-Encoding: chunked", b"Transfer-Encoding: identity", b"Transfer-Encoding : chunked",
    b"Transfer-Encoding: xchunked", b"Transfer-Encoding:\tchunked", b"Expect: 100-continue", b"Upgrade: h2c",
    b"Connection: close", b"Connection: keep-alive", b"Connection: Upgrade, x-private", b"X-Private: 1",
    b"Host: other", b"X-Multi: 1", b"x-multi: 2", b"X-Fold: a\r\n b", b" X-Space: 1", b"X Space: 1",
    b"X-Empty:", b"X-Latin: \xe9", b"X-Null: a\x00b", b"X-Bare: a\nInjected: 1", b"X-Return: a\rb",
    b"X-Del: \x7f",
    b"X-Request-Id: mine", b"traceparent: 00-" + b"a" * 32 + b"-" + b"b" * 16 + b"-01", b"TE: trailers",
    b"Content-Encoding: gzip", b"Content-Type: text/plain", b"No-Colon", b": no-name",
    b"X-Long: " + b"x" * 8185,
    b"Sec-WebSocket-Key1: 1", b"X-Tab:\ta\tb\t", b"Trailer: X", b"Cookie: a=b",
)  # fmt: skip
ODD_LINES = (
    b"POST /v1/chat/completions?x=1&y=%20 HTTP/1.1", b"POST /v1/chat/completions#f HTTP/1.1",
    b"POST /v1/chat/completions HTTP/1.0", b"POST /v1/chat/completions HTTP/1.2",
    b"POST /v1/chat/completions  HTTP/1.1", b"POST  /v1/chat/completions HTTP/1.1",
    b"POST http://router/v1/chat/completions HTTP/1.1", b"post /v1/chat/completions HTTP/1.1",
    b"GET /v1/chat/completions HTTP/1.1", b"POST /v1/../v1/chat/completions HTTP/1.1",
    b"GET /health HTTP/1.1",
    b"POST /v1/embeddings HTTP/1.1", b"POST /v1/chat/completions/ HTTP/1.1", b"POST /v1/chat/completions",
    b"POST /v1/chat/completions HTTP/1.1 ", b"\r\nPOST /v1/chat/completions HTTP/1.1",
    b"POST\t/v1/chat/completions HTTP/1.1", b"POST /v1/chat/completions?" + b"q" * 8200 + b" HTTP/1.1",
)  # fmt: skip
ODD_BODIES = (
    b"", b"{", BODY + b" ", b"5\r\nhello\r\n0\r\n\r\n", b" " * 3000, b'{"model":"nothing"}',
    b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n",
)  # fmt: skip


def random_bytes(chance: random.Random, key: str) -> bytes:
    """Makes one to three requests, most of them odd somewhere, and sometimes damages their bytes."""
    text = b""
    for _ in range(chance.choice((1, 1, 2, 3))):
        body = chance.choice(ODD_BODIES) if chance.random() < 0.3 else BODY
        chunked = chance.random() < 0.1
        text += request(
            key if chance.random() < 0.9 else "sk-wrong",
            line=chance.choice(ODD_LINES) if chance.random() < 0.3 else b"POST /v1/chat/completions HTTP/1.1",
            headers=[
                *chance.sample(ODD_HEADERS, chance.choice((0, 0, 1, 2))),
                *([b"Transfer-Encoding: chunked"] if chunked else []),
            ],
            body=b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body) if chunked and body else body,
            length=b"" if chunked else chance.choice((None, None, None, None, b"%d" % (len(body) + 3))),
        )
    data = bytearray(text)
    for _ in range(chance.choice((0, 0, 0, 1, 2))):
        at = chance.randrange(len(data))
        match chance.randrange(4):
            case 0:
                data[at] = chance.randrange(256)
            case 1:
                del data[at]
            case 2:
                data.insert(at, chance.choice(b"\r\n\x00 :\t0;"))
            case _:
                data[at:at] = chance.choice((b"\r\n", b"\r\n\r\n", b"0\r\n\r\n"))
    return bytes(data)


def cut(data: bytes, places: Iterable[int]) -> list[bytes]:
    """Cuts bytes at some places, and where requests seem to end."""
    ordered = sorted({min(place, len(data)) for place in (*places, *_ends(data))})
    return [data[start:end] for start, end in pairwise((0, *ordered, len(data))) if end > start]


def _ends(data: bytes) -> Iterator[int]:
    end = 0
    while (head := data.find(b"\r\n\r\n", end)) >= 0:
        if _CHUNKED.search(data, end, head + 4):
            # A whole chunked body ends with the next empty line after an empty chunk.
            last = data.find(b"0\r\n\r\n", head + 4)
            end = len(data) if last < 0 else last + 5
        else:
            length = _LENGTH.search(data, end, head + 4)
            end = head + 4 + (int(length[1][:9]) if length else 0)
        if end > len(data):
            return
        yield end


async def compare(sides: tuple[Side, Side], pieces: Sequence[bytes]) -> tuple[Account, Account]:
    """Sends the same pieces to both."""
    return await sides[0].send(pieces), await sides[1].send(pieces)


async def _run(seconds: float, seed: int) -> int:
    chance = random.Random(seed)
    until, count, differences = time.monotonic() + seconds, 0, 0
    async with two_sides() as sides:
        while time.monotonic() < until:
            data = random_bytes(chance, sides[0].cluster.api_key)
            places = [chance.randrange(len(data)) for _ in range(chance.choice((0, 0, 1, 2, 5)))]
            pieces = cut(data, places)
            hot, plain = await compare(sides, pieces)
            count += 1
            if hot != plain:
                differences += 1
                sys.stdout.write(f"differs: {pieces!r}\n  hot   {hot}\n  plain {plain}\n")
    sys.stdout.write(f"{count} byte strings, {differences} differences (seed {seed})\n")
    return 1 if differences else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    sys.exit(asyncio.run(_run(options.seconds, options.seed)))
