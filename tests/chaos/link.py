"""A wire between two processes that a test can cut: a TCP proxy on this machine.

In comes the address of the real server, out comes a port to give to the client in its place. While a
direction is cut, what is sent there waits, as behind a network that drops everything: nobody is told, and
what the sender's kernel kept arrives once the wire is whole again. It never looks at what it carries, but
for one thing: it can be asked to stop at a message that holds certain words.
"""

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from typing import Self

from core.tasks import cancel_and_wait

_CHUNK_BYTES = 64 * 1024


class Link:
    """One wire. `there` is from client to server, `back` the other way.

    Attributes:
        port: Where the client connects; known once it is open.
        stopped: Set once a message with the awaited words has been held.
    """

    def __init__(self, host: str, server_port: int) -> None:
        self.port = 0
        self.stopped = asyncio.Event()
        self._host, self._server_port = host, server_port
        self._whole = {"there": asyncio.Event(), "back": asyncio.Event()}
        for each in self._whole.values():
            each.set()
        self._words: tuple[bytes, ...] = ()
        self._server: asyncio.Server | None = None
        self._carriers: set[asyncio.Task[None]] = set()

    async def open(self) -> Self:
        self._server = await asyncio.start_server(self._accepted, self._host, 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def close(self) -> None:
        if self._server is not None:
            self._server.close()
        await cancel_and_wait(*self._carriers)

    def cut(self, *directions: str) -> None:
        """Cuts `there`, `back`, or both."""
        for direction in directions or ("there", "back"):
            self._whole[direction].clear()

    def mend(self) -> None:
        """Makes it whole; what waited arrives."""
        self._words = ()
        for each in self._whole.values():
            each.set()

    def stop_at(self, *words: bytes) -> None:
        """Cuts `there` right before a message from the client that holds all these words."""
        self.stopped.clear()
        self._words = words

    def _accepted(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(self._carry(reader, writer), name="link-connection")
        self._carriers.add(task)
        task.add_done_callback(self._carriers.discard)

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # A wire that is cut answers no new connection either.
        for each in self._whole.values():
            await each.wait()
        other: asyncio.StreamWriter | None = None
        try:
            other_reader, other = await asyncio.open_connection(self._host, self._server_port)
            pumps = (
                asyncio.create_task(self._pump(reader, other, "there"), name="link-there"),
                asyncio.create_task(self._pump(other_reader, writer, "back"), name="link-back"),
            )
            try:
                await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
            finally:
                await cancel_and_wait(*pumps)
        except OSError:
            pass  # the server is down: the client sees its connection end, as it would without us
        finally:
            _close(writer, other)

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, direction: str) -> None:
        with suppress(OSError):
            while chunk := await reader.read(_CHUNK_BYTES):
                if direction == "there" and self._words and all(word in chunk for word in self._words):
                    self._words = ()
                    self.cut("there")
                    self.stopped.set()
                await self._whole[direction].wait()
                writer.write(chunk)
                await writer.drain()


def _close(*writers: asyncio.StreamWriter | None) -> None:
    for writer in writers:
        if writer is not None:
            writer.transport.abort()


async def open_links(host: str, ports: Sequence[int]) -> list[Link]:
    """Opens one wire to each port."""
    return [await Link(host, port).open() for port in ports]
