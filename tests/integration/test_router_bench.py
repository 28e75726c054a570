"""The tools of the live benchmarks can be trusted: the client counts failures; a short soak leaks nothing."""

import asyncio
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.bench.router_live.native import build
from tests.bench.router_live.processes import Cores
from tests.bench.router_live.speed import canned_engines
from tests.bench.router_live.targets import Site
from tests.bench.router_soak import soak
from tests.support.fake_engine import Behaviour, FakeEngine, answers, breaks_after, hangs_up, silent, streams

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(
        shutil.which(os.environ.get("CC", "cc")) is None, reason="the load client needs a C compiler"
    ),
]
EVENT = b'data: {"choices":[]}\n\n'
DONE = b"data: [DONE]\n\n"


async def client(port: int, *options: str) -> dict[str, Any]:
    process = await asyncio.create_subprocess_exec(
        str(build("client")),
        *("--port", str(port), "--connections", "4", "--warmup-seconds", "0", "--seconds", "0.2"),
        *("--patience-seconds", "0.3", *options),
        stdout=asyncio.subprocess.PIPE,
    )
    output, _ = await process.communicate()
    assert process.returncode == 0
    account: dict[str, Any] = json.loads(output)
    return account


async def test_the_client_agrees_with_the_canned_engine(tmp_path: Path) -> None:
    cores = Cores.of_this_machine()
    async with canned_engines(Site(tmp_path, cores), count=2) as urls:
        port = int(urls[1].rsplit(":", 1)[1])
        whole = await client(port)
        assert whole["answers"] > 0
        assert sum(whole["failures"].values()) == 0
        stream = await client(port, "--stream", "1", "--events", "5")
        assert stream["events"] == 5 * stream["answers"] > 0
        assert sum(stream["failures"].values()) == 0


@pytest.mark.parametrize(
    ("behaviour", "options", "kind"),
    [
        (answers(500, b"{}"), (), "status"),
        (answers(200, b"{}"), ("--expect-bytes", "3"), "length"),
        (hangs_up, (), "closed"),
        (breaks_after(b"{", content_length=9), (), "closed"),
        (streams([EVENT, DONE]), ("--stream", "1", "--events", "2"), "length"),
        (streams([EVENT, EVENT, EVENT]), ("--stream", "1", "--events", "2"), "length"),
        (breaks_after(EVENT), ("--stream", "1", "--events", "2"), "closed"),
        (silent, (), "unanswered"),
    ],
)
async def test_the_client_counts_what_fails(
    behaviour: Behaviour, options: tuple[str, ...], kind: str
) -> None:
    async with FakeEngine(behaviour) as engine:
        # At a rate: the client gives up on a target that fails it thousands of times in a row.
        account = await client(engine.port, "--rate", "500", *options)
    assert account["answers"] == 0
    assert account["failures"][kind] > 0
    assert account["failures"][kind] == sum(account["failures"].values())


async def test_the_client_accepts_streams_in_any_pieces() -> None:
    pieces = [EVENT[:9], EVENT[9:] + EVENT[:-1], EVENT[-1:] + DONE]
    async with FakeEngine(streams(pieces)) as engine:
        account = await client(engine.port, "--stream", "1", "--events", "2")
    assert account["events"] == 2 * account["answers"] > 0
    assert sum(account["failures"].values()) == 0


async def test_a_short_soak_gives_everything_back(tmp_path: Path) -> None:
    outcome = await soak(Site(tmp_path, Cores.of_this_machine()), seconds=4, share=0.7)
    assert outcome.answers > 0
    assert outcome.events > 0
    assert outcome.hung_up > 0
    assert outcome.failed == 0
    # Seconds are too short for the bound of an hour; a leak per request would be far above this.
    assert outcome.growth < 0.1
    assert outcome.after.sockets <= outcome.before.sockets
    assert outcome.after.tasks <= outcome.before.tasks
