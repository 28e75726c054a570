"""An answer on its way: what it waits for, whom it holds back, and how it ends; in virtual time."""

import asyncio
from typing import Any, cast

import pytest

from router.upstream.answer import HELD_BYTES_MAX, Answer, AnswerSignals
from router.upstream.connection import Connection
from router.upstream.pool import Origin
from router.upstream.relay import Outcome
from router.wire.deadlines import Deadlines
from router.wire.outbox import Outbox
from tests.support.clock import ManualClock

IDLE_SECONDS = 10.0
STALL_SECONDS = 3.0
STREAM = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"


class _Line:
    """A connection of ours, and what it does to its transport; it is that transport."""

    def __init__(self, clock: ManualClock) -> None:
        self._origin = Origin("http://engine:8000", Deadlines(clock))
        self.connection = Connection(
            self._origin, Outbox(cast("asyncio.AbstractEventLoop", None)), clock.monotonic
        )
        self.connection.connection_made(cast("asyncio.BaseTransport", self))
        self.paused = False
        self.aborted = False

    @property
    def deadline_seconds(self) -> float:
        return self.connection.deadline_seconds

    @property
    def kept(self) -> list[bool]:
        """Whether the connection was kept, once its answer has ended."""
        if self.aborted:
            return [False]
        found = []
        while connection := self._origin.take():
            found.append(connection)
        for connection in found:
            self._origin.keep(connection)
        return [True] * len(found)

    # What a connection asks of its transport.

    def pause_reading(self) -> None:
        self.paused = True

    def resume_reading(self) -> None:
        self.paused = False

    def is_closing(self) -> bool:
        return self.aborted

    def get_write_buffer_size(self) -> int:
        return 0

    def abort(self) -> None:
        self.aborted = True


class _Downstream:
    """What an answer asks of the client's side."""

    def __init__(self) -> None:
        self.blocked = False
        self.listener: Any = None
        self.written: list[tuple[bytes, bytes]] = []

    def write(self, piece: bytes, framed: bytes = b"") -> None:
        self.written.append((piece, framed))


class _Upper:
    """A transform that changes some pieces and leaves others as they are."""

    def feed(self, piece: bytes) -> bytes:
        return piece.upper() if piece == b"one" else piece

    def finish(self) -> bytes:
        return b""


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


def _answer(clock: ManualClock) -> tuple[Answer, _Line, _Downstream]:
    line = _Line(clock)
    return Answer(line.connection, AnswerSignals(), idle_seconds=IDLE_SECONDS), line, _Downstream()


def _flow(answer: Answer, downstream: _Downstream, transform: Any = None) -> None:
    answer.flow(cast("Any", downstream), transform, client_stall_seconds=STALL_SECONDS)


def test_a_whole_answer_is_judged_when_it_is_complete(clock: ManualClock) -> None:
    answer, connection, downstream = _answer(clock)
    answer.received(b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello")
    assert answer.ready
    assert answer.outcome is Outcome.COMPLETE
    assert connection.kept == [True]
    _flow(answer, downstream)
    assert downstream.written == [(b"hello", b"")]
    answer.release()
    assert connection.kept == [True]


def test_an_error_is_judged_with_its_body_only(clock: ManualClock) -> None:
    answer, _, _ = _answer(clock)
    answer.received(b"HTTP/1.1 500 No\r\ncontent-length: 5\r\n\r\nhel")
    assert not answer.ready
    answer.received(b"lo")
    assert answer.ready
    assert answer.head == b"hello"


def test_chunks_that_cannot_be_trusted_break_the_answer(clock: ManualClock) -> None:
    answer, connection, _ = _answer(clock)
    answer.received(STREAM + b"3\r\nfour\r\n")
    assert answer.outcome is Outcome.BROKEN
    assert connection.kept == [False]


def test_a_whole_chunk_passes_as_it_came_unless_a_transform_changes_it(clock: ManualClock) -> None:
    answer, _, downstream = _answer(clock)
    answer.received(STREAM + b"3\r\nnil\r\n")
    _flow(answer, downstream, _Upper())
    for data in (b"3\r\none\r\n", b"3\r\ntwo\r\n", b"3\r\nthr", b"\r\n4\r\nfour\r\n", b"0\r\n\r\n"):
        answer.received(data)
    assert downstream.written == [
        (b"nil", b""), (b"ONE", b""), (b"two", b"3\r\ntwo\r\n"), (b"thr", b""), (b"four", b""),
    ]  # fmt: skip
    assert answer.outcome is Outcome.COMPLETE


async def test_silence_before_and_after_the_first_byte(clock: ManualClock) -> None:
    answer, connection, downstream = _answer(clock)
    answer.overdue()
    assert answer.timed_out
    assert connection.kept == [False]

    answer, connection, downstream = _answer(clock)
    answer.received(STREAM + b"3\r\none\r\n")
    _flow(answer, downstream)
    await clock.advance(IDLE_SECONDS - 1)
    answer.received(b"3\r\ntwo\r\n")
    await clock.advance(2)
    answer.overdue()
    assert answer.outcome is None
    assert connection.deadline_seconds == pytest.approx(2 * IDLE_SECONDS - 1)
    await clock.advance(IDLE_SECONDS)
    answer.overdue()
    assert answer.outcome is Outcome.IDLE
    assert connection.kept == [False]


async def test_a_client_that_does_not_take_holds_the_engine_back(clock: ManualClock) -> None:
    answer, connection, downstream = _answer(clock)
    answer.received(STREAM + b"3\r\none\r\n")
    _flow(answer, downstream)
    downstream.blocked = True
    answer.received(b"3\r\ntwo\r\n")
    assert connection.paused
    assert connection.deadline_seconds == STALL_SECONDS
    downstream.blocked = False
    answer.drained()
    assert not connection.paused
    downstream.blocked = True
    answer.received(b"3\r\nthr\r\n")
    await clock.advance(STALL_SECONDS)
    answer.overdue()
    assert answer.outcome is Outcome.CLIENT_STALLED


def test_what_nobody_takes_yet_is_bounded(clock: ManualClock) -> None:
    answer, connection, downstream = _answer(clock)
    answer.received(b"HTTP/1.1 200 OK\r\n\r\n" + b"x" * (HELD_BYTES_MAX + 1))
    assert connection.paused
    _flow(answer, downstream)
    assert not connection.paused


@pytest.mark.parametrize(
    ("head", "error", "outcome"),
    [
        (b"HTTP/1.1 200 OK\r\n\r\n", None, Outcome.COMPLETE),
        (b"HTTP/1.1 200 OK\r\n\r\n", ConnectionResetError("reset"), Outcome.BROKEN),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\n", None, Outcome.BROKEN),
        (STREAM, None, Outcome.BROKEN),
        (b"HTTP/1.1 20", None, Outcome.BROKEN),
        (b"", None, Outcome.BROKEN),
    ],
)
def test_the_end_of_the_connection(
    clock: ManualClock, head: bytes, error: Exception | None, outcome: Outcome
) -> None:
    answer, connection, _ = _answer(clock)
    if head:
        answer.received(head)
    answer.connection_ended(error)
    assert answer.outcome is outcome
    assert answer.begun is bool(head)
    assert connection.kept == [False]
    answer.lost()
    assert answer.outcome is outcome
