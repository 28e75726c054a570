"""KV events over real sockets: an engine's blocks, a reader's mirror, an agent's stream."""

import asyncio
import random
import sys
import time
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import grpc
import pytest
import pytest_asyncio
from millrace.agent.v1 import node_agent_service_pb2 as messages
from millrace.agent.v1 import node_agent_service_pb2_grpc

from core.block_hash import block_hash, event_hash
from core.rpc import call_metadata, open_channel
from core.tasks import cancel_and_wait
from nodeagent.engines.simulator.engine_model import EngineModel, SequenceRequest
from nodeagent.engines.simulator.kv_publisher import KvEventPublisher
from nodeagent.engines.simulator.settings import EngineLimits, KvEventSettings, StepTiming
from nodeagent.kv_events.mirror import CacheMirror, HashScheme
from nodeagent.kv_events.reader import EventReader, EventSource
from tests.integration.test_nodeagent import World
from tests.support.fleet import TOKEN, simulator_assignment
from tests.support.ports import free_ports
from tests.support.waiting import eventually

pytestmark = pytest.mark.integration


def chain(token_ids: list[int], block_tokens: int = 16) -> set[int]:
    """The hashes of a prompt's full blocks, as a router would work them out."""
    hashes, parent = set(), None
    for start in range(0, len(token_ids) - block_tokens + 1, block_tokens):
        parent = block_hash(parent, token_ids[start : start + block_tokens])
        hashes.add(event_hash(parent))
    return hashes


class Deaf:
    """Stands in for a publisher's socket and loses everything."""

    def send_multipart(self, frames: Any) -> None:
        """Loses a message."""


class Engine:
    """An engine without HTTP: its blocks can be looked at, and its messages lost."""

    def __init__(self, settings: KvEventSettings) -> None:
        limits = EngineLimits(max_model_length_tokens=512, block_count=40, kv_events=True)
        self.model = EngineModel(limits, StepTiming())
        self.publisher = KvEventPublisher(settings)

    def ask(self, token_ids: list[int], *, lost: bool = False) -> None:
        heard = self.publisher._publisher
        if lost:
            self.publisher._publisher = Deaf()  # type: ignore[assignment]
        self.model.submit(SequenceRequest(token_ids, 3, "length", lambda index: index), 0.0)
        while (step := self.model.begin_step(0.0)) is not None:
            self.model.finish_step(step, 0.0)
            self.publisher.publish(self.model.journal.take(), time.time())
        self.publisher._publisher = heard

    def hashes(self) -> set[int]:
        return {event_hash(digest) for digest in self.model.pool.cached_hashes()}


@asynccontextmanager
async def reading(source: EventSource) -> AsyncIterator[CacheMirror]:
    mirror = CacheMirror("run")
    task = asyncio.create_task(EventReader(source, mirror).run(), name="reader")
    try:
        yield mirror
    finally:
        await cancel_and_wait(task)


def ipc(folder: Path, **changes: Any) -> tuple[KvEventSettings, EventSource]:
    endpoint, replay = f"ipc://{folder}/kv", f"ipc://{folder}/replay"
    return KvEventSettings(endpoint, replay, **changes), EventSource(endpoint, replay, "")


@pytest.mark.parametrize("positional", [False, True])
async def test_a_late_reader_hears_the_past_and_then_the_present(tmp_path: Path, positional: bool) -> None:
    settings, source = ipc(tmp_path, positional=positional)
    engine = Engine(settings)
    prompts = random.Random(1)
    for _ in range(10):
        engine.ask([prompts.randrange(50) for _ in range(prompts.randrange(200))] + [1])
    try:
        async with reading(source) as mirror:
            await eventually(lambda: mirror.present() == engine.hashes())
            assert mirror.complete
            assert mirror.hash_scheme is HashScheme.SHA256_PICKLE
            assert mirror.block_tokens == 16
            for _ in range(10):
                engine.ask([prompts.randrange(50) for _ in range(prompts.randrange(200))] + [1])
                await eventually(lambda: mirror.present() == engine.hashes())
            engine.model.clear_cache()
            engine.ask(list(range(100)))
            await eventually(lambda: mirror.present() == engine.hashes())
            assert mirror.present() == chain(list(range(100)))
            assert mirror.complete
    finally:
        engine.publisher.close()


async def test_lost_messages_are_repeated_or_cost_what_was_known(tmp_path: Path) -> None:
    settings, source = ipc(tmp_path, buffer_steps=4)
    engine = Engine(settings)
    try:
        async with reading(source) as mirror:
            engine.ask(list(range(40)))
            await eventually(lambda: mirror.present() == engine.hashes())
            engine.ask(list(range(100, 140)), lost=True)
            engine.ask(list(range(200, 240)))
            await eventually(lambda: mirror.present() == engine.hashes())
            assert mirror.complete
            for start in range(1000, 1800, 100):
                engine.ask(list(range(start, start + 40)), lost=True)
            engine.ask(list(range(2000, 2040)))
            await eventually(lambda: chain(list(range(2000, 2040))) <= mirror.present())
            assert mirror.present() < engine.hashes()
            assert not mirror.complete
    finally:
        engine.publisher.close()


@asynccontextmanager
async def simulator(port: int, *flags: str) -> AsyncIterator[asyncio.subprocess.Process]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "nodeagent.engines.simulator", "--model", "tiny", "--port", str(port),
        *flags, stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    try:
        async with asyncio.timeout(20):
            while b"startup complete" not in (line := await process.stdout.readline()):
                assert line, "it ended before it listened"
        yield process
    finally:
        process.kill()
        await process.communicate()


async def complete(port: int, token_ids: list[int], model: str = "tiny") -> None:
    body = {"model": model, "prompt": token_ids, "max_tokens": 1}
    async with (
        aiohttp.ClientSession() as client,
        client.post(f"http://127.0.0.1:{port}/v1/completions", json=body) as response,
    ):
        assert response.status == 200, await response.text()


async def test_an_engine_that_is_killed_and_started_again_is_mirrored_anew(tmp_path: Path) -> None:
    http, events, replay = free_ports(3)
    endpoints = f'"endpoint":"tcp://*:{events}","replay_endpoint":"tcp://*:{replay}"'
    flags = ("--kv-events-config", f'{{"enable_kv_cache_events":true,{endpoints}}}')
    source = EventSource(f"tcp://127.0.0.1:{events}", f"tcp://127.0.0.1:{replay}", "")
    old, new = list(range(64)), list(range(500, 564))
    async with reading(source) as mirror:
        async with simulator(http, *flags):
            await complete(http, old)
            await eventually(lambda: mirror.present() == chain(old), timeout_seconds=20)
        async with simulator(http, *flags):
            # Connections come back by themselves; a message before that is heard by replay.
            async def followed() -> bool:
                await complete(http, [*new, random.randrange(1000)])
                await complete(http, [random.randrange(10**6) for _ in range(20)])
                return chain(new) <= mirror.present() and not chain(old) & mirror.present()

            await eventually(followed, timeout_seconds=20, interval_seconds=0.1)
            assert mirror.complete


@pytest_asyncio.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    world = World(tmp_path)
    world.port = await world.fleet.start()
    try:
        yield world
    finally:
        if world.running is not None:
            await world.running.end()
        await world.fleet.stop()


async def offered(refused: Awaitable[bool]) -> bool:
    """An agent asks its engines one after the other."""
    return not await refused


async def test_a_router_follows_an_engine_through_its_agent(world: World, tmp_path: Path) -> None:
    token = tmp_path / "router-token"
    token.write_text("token-of-routers")
    running = await world.start_agent(router_token_file=token, stop_engines_on_exit=True)
    world.fleet.assign(simulator_assignment("chat-a", kv_events=True), simulator_assignment("chat-b"))
    await world.ready("chat-a")
    await world.ready("chat-b")
    port = int(world.fleet.latest["chat-a"].url.rpartition(":")[2])
    prompt = list(range(80))
    await complete(port, prompt, "chat")
    copy: set[int] = set()
    async with open_channel(f"127.0.0.1:{running.agent.grpc_port}") as channel:
        stub = node_agent_service_pb2_grpc.NodeAgentServiceStub(channel)
        metadata = call_metadata("token-of-routers")

        async def refused(replica: str, code: grpc.StatusCode, secret: str = "token-of-routers") -> bool:
            request = messages.StreamKvEventsRequest(replica=replica)
            try:
                await anext(aiter(stub.StreamKvEvents(request, metadata=call_metadata(secret))))
            except grpc.aio.AioRpcError as error:
                return error.code() == code
            return False

        await eventually(lambda: refused("chat-b", grpc.StatusCode.FAILED_PRECONDITION))
        await eventually(lambda: offered(refused("chat-a", grpc.StatusCode.UNAVAILABLE)))
        assert await refused("chat-c", grpc.StatusCode.NOT_FOUND)
        assert await refused("chat-a", grpc.StatusCode.PERMISSION_DENIED, TOKEN)
        with pytest.raises(grpc.aio.AioRpcError, match="may not call"):
            await stub.ListEngines(messages.ListEnginesRequest(), metadata=metadata)

        request = messages.StreamKvEventsRequest(replica="chat-a")
        stream = aiter(stub.StreamKvEvents(request, metadata=metadata))

        async def read_until(wanted: set[int]) -> messages.StreamKvEventsResponse:
            async with asyncio.timeout(20):
                async for message in stream:
                    apply(copy, message)
                    if wanted <= copy and message.WhichOneof("kind") != "snapshot_part":
                        return message
            raise AssertionError("the stream ended")

        def apply(blocks: set[int], message: messages.StreamKvEventsResponse) -> None:
            if message.WhichOneof("kind") == "snapshot_part":
                # One part is enough here; more would have to be put together.
                blocks.clear()
                blocks.update(message.snapshot_part.block_hashes)
            if message.WhichOneof("kind") == "snapshot_end":
                assert message.snapshot_end.incarnation == world.fleet.latest["chat-a"].incarnation
            blocks.difference_update(message.change.removed_block_hashes)
            blocks.update(message.change.stored_block_hashes)

        await read_until(chain(prompt))
        longer = [*prompt, *range(1000, 1100)]
        await complete(port, longer, "chat")
        last = await read_until(chain(longer))

        # Another stream goes on where this one was.
        third = list(range(5000, 5050))
        await complete(port, third, "chat")
        request = messages.StreamKvEventsRequest(replica="chat-a", epoch=last.epoch, sequence=last.sequence)
        resumed = await anext(aiter(stub.StreamKvEvents(request, metadata=metadata)))
        assert set(resumed.change.stored_block_hashes) == chain(third)

        world.fleet.remove("chat-a")
        async with asyncio.timeout(20):
            while True:
                try:
                    await anext(stream)
                except StopAsyncIteration:
                    break
