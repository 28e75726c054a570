"""What only a process of its own shows: signals, pipes, the entry point."""

import asyncio
import os
import signal
import sys
from asyncio.subprocess import PIPE, Process

from millrace.core.v1.event_pb2 import Event

from tests.support.fake_scheduler import ADMIN_TOKEN, FakeScheduler, ServedScheduler
from tests.support.waiting import eventually

PROGRAM = "from millrace_client.cli import main; main()"


async def start(served: ServedScheduler, *arguments: str) -> Process:
    return await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        PROGRAM,
        *arguments,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=PIPE,
        stderr=PIPE,
        env={**os.environ, "MILLRACE_SERVER": served.target, "MILLRACE_TOKEN": ADMIN_TOKEN},
    )


async def test_following_ends_quietly_with_ctrl_c(served: ServedScheduler, scheduler: FakeScheduler) -> None:
    process = await start(served, "events", "-f", "-o", "json")
    assert process.stdout is not None
    async with asyncio.timeout(20):
        await eventually(lambda: scheduler.watching_events == 1, timeout_seconds=15)
        scheduler.emit(Event(id="01", namespace="team-ai", reason="Declared"))
        assert b'"reason": "Declared"' in await process.stdout.readline()
        process.send_signal(signal.SIGINT)
        _, stderr = await process.communicate()
    assert (process.returncode, stderr) == (130, b"")
    await eventually(lambda: scheduler.watching_events == 0)


async def test_reader_that_goes_away_is_no_error(served: ServedScheduler, scheduler: FakeScheduler) -> None:
    process = await start(served, "events", "-f", "-o", "json")
    assert process.stdout is not None
    async with asyncio.timeout(20):
        await eventually(lambda: scheduler.watching_events == 1, timeout_seconds=15)
        scheduler.emit(Event(id="01", namespace="team-ai", reason="Declared"))
        await process.stdout.readline()
        transport = process._transport.get_pipe_transport(1)  # type: ignore[attr-defined]
        transport.close()
        await asyncio.sleep(0.05)
        scheduler.emit(Event(id="02", namespace="team-ai", reason="Ready"))
        assert process.stderr is not None
        assert await process.stderr.read() == b""
        assert await process.wait() == 141
