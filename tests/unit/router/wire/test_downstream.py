"""What goes to the client: framing, one buffer for the head and the first piece, chunks as they came."""

import asyncio
from collections.abc import Callable
from typing import Any, cast

import pytest

from router.wire.downstream import WireDownstream
from router.wire.outbox import Outbox


class _Transport:
    def __init__(self) -> None:
        self.writes: list[bytes] = []
        self.aborted = False

    def write(self, data: bytes) -> None:
        self.writes.append(data)

    def is_closing(self) -> bool:
        return False

    def abort(self) -> None:
        self.aborted = True


class _Loop:
    """Ends its turn at once."""

    def call_soon(self, callback: Callable[[], None]) -> None:
        callback()


def _downstream() -> tuple[WireDownstream, _Transport]:
    transport = _Transport()
    made = WireDownstream(
        cast("asyncio.WriteTransport", transport),
        Outbox(cast("asyncio.AbstractEventLoop", _Loop())),
        blocked=False,
    )
    made.identify("rid")
    return made, transport


def test_a_body_of_known_length_is_one_write() -> None:
    downstream, transport = _downstream()
    downstream.start(200, {"Content-Type": "a/b"}, length=5)
    downstream.write(b"hello")
    downstream.end()
    (data,) = transport.writes
    head, _, body = data.partition(b"\r\n\r\n")
    assert body == b"hello"
    lines = head.split(b"\r\n")
    assert lines[0] == b"HTTP/1.1 200 OK"
    assert {b"Content-Type: a/b", b"x-request-id: rid", b"Content-Length: 5"} <= set(lines)
    assert any(line.startswith(b"Date: ") for line in lines)


def test_a_stream_comes_in_chunks_and_whole_chunks_pass_as_they_came() -> None:
    downstream, transport = _downstream()
    downstream.start(200, {"Content-Type": "text/event-stream"}, length=None)
    downstream.write(b"one")
    downstream.write(b"two", b"03;x\r\ntwo\r\n")
    downstream.write(b"")
    downstream.end()
    sent = b"".join(transport.writes)
    assert sent.partition(b"\r\n\r\n")[2] == b"3\r\none\r\n03;x\r\ntwo\r\n0\r\n\r\n"
    assert downstream.tail == b"two"
    assert downstream.ended


@pytest.mark.parametrize("status", [204, 304])
def test_a_status_without_body_is_not_framed(status: int) -> None:
    downstream, transport = _downstream()
    downstream.start(status, {}, length=None)
    downstream.end()
    (head,) = transport.writes
    assert b"chunked" not in head
    assert b"Content-Length" not in head


def test_an_empty_body_still_has_its_head() -> None:
    downstream, transport = _downstream()
    downstream.start(599, {}, length=0)
    downstream.end(close=True)
    assert b"".join(transport.writes).startswith(b"HTTP/1.1 599 \r\n")
    assert downstream.closes


def test_a_header_cannot_bring_another_one() -> None:
    downstream, _ = _downstream()
    with pytest.raises(ValueError, match="line end"):
        downstream.start(200, {"x-name": "a\r\nInjected: 1"}, length=0)


async def test_a_client_that_has_left_gets_nothing_and_holds_nobody() -> None:
    downstream, transport = _downstream()
    downstream.start(200, {}, length=None)
    downstream.block()
    waiting: asyncio.Task[Any] = asyncio.create_task(downstream.drain())
    await asyncio.sleep(0)
    downstream.lose()
    with pytest.raises(ConnectionResetError):
        await waiting
    downstream.write(b"late")
    downstream.end()
    downstream.abort()
    assert transport.writes == []


async def test_drain_waits_until_the_client_takes_more() -> None:
    downstream, _ = _downstream()
    told: list[str] = []

    class Listener:
        def drained(self) -> None:
            told.append("drained")

        def lost(self) -> None:
            told.append("lost")

    downstream.listener = Listener()
    await downstream.drain()
    downstream.block()
    waiting = asyncio.create_task(downstream.drain())
    await asyncio.sleep(0)
    assert not waiting.done()
    downstream.unblock()
    await waiting
    assert told == ["drained"]
