"""KV events of the simulator: what is told, when, and in which form."""

import asyncio
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import msgspec
import pytest
import zmq
import zmq.asyncio
from hypothesis import given, settings
from hypothesis import strategies as st

from core.block_hash import block_hash, event_hash
from nodeagent.engines.simulator.engine_model import EngineModel, SequenceRequest
from nodeagent.engines.simulator.kv_journal import BlockRemoved, BlocksStored, CacheCleared, KvEvent
from nodeagent.engines.simulator.kv_publisher import binds, offset_endpoint, wire_event
from nodeagent.engines.simulator.settings import EngineLimits, StepTiming
from tests.unit.nodeagent.engines.simulator.conftest import Serve

LIMITS = EngineLimits(
    max_model_length_tokens=128,
    max_running_sequences=4,
    max_batched_tokens=40,
    block_size_tokens=4,
    block_count=40,
    kv_events=True,
)
CONFIGURATION = (
    '{"enable_kv_cache_events":true,"endpoint":"tcp://*:0","replay_endpoint":"tcp://*:0","topic":"kv"}'
)


def replayed(events: list[KvEvent]) -> set[bytes]:
    """The cache as somebody knows it who only hears the events."""
    known: set[bytes] = set()
    for event in events:
        if isinstance(event, BlocksStored):
            known.update(event.digests)
        elif isinstance(event, BlockRemoved):
            known.remove(event.digest)
        else:
            known.clear()
    return known


PROMPTS = st.tuples(st.integers(0, 2), st.integers(1, 60), st.integers(1, 40))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.one_of(PROMPTS, st.just("clear"), st.just("step")), max_size=40))
def test_events_tell_the_whole_truth_about_the_cache(actions: list[Any]) -> None:
    model = EngineModel(LIMITS, StepTiming())
    events: list[KvEvent] = []

    def step() -> None:
        under_way = model.begin_step(0.0)
        if under_way is not None:
            model.finish_step(under_way, 0.0)
            events.extend(model.journal.take())

    for action in actions:
        if action == "clear":
            model.clear_cache()
        elif action == "step":
            step()
        else:
            start, length, output = action
            prompt = [start, *range(length)]
            model.submit(SequenceRequest(prompt, output, "length", lambda index: index), 0.0)
    while model.has_work():
        step()
    events.extend(model.journal.take())
    assert replayed(events) == model.pool.cached_hashes()


def test_stored_blocks_carry_what_their_hashes_are_made_of() -> None:
    model = EngineModel(LIMITS, StepTiming())
    model.submit(SequenceRequest(list(range(9)), 1, "length", lambda index: index, cache_salt="tenant"), 0.0)
    under_way = model.begin_step(0.0)
    assert under_way is not None
    (event,) = model.journal.take()
    assert isinstance(event, BlocksStored)
    first = block_hash(None, range(4), (("cache_salt", "tenant"),))
    assert event.digests == [first, block_hash(first, range(4, 8))]
    wire = wire_event(event, positional=False)
    assert wire["block_hashes"] == [event_hash(digest) for digest in event.digests]
    assert (wire["parent_block_hash"], wire["token_ids"]) == (None, list(range(8)))
    assert wire["extra_keys"] == [["tenant"], None]
    assert wire_event(event, positional=True)[:2] == ["BlockStored", wire["block_hashes"]]
    assert wire_event(CacheCleared(), positional=True) == ["AllBlocksCleared"]


@pytest.mark.parametrize(
    ("endpoint", "bound"),
    [
        ("tcp://*:5557", True),
        ("tcp://[::]:5557", True),
        ("ipc:///tmp/x", True),
        ("tcp://127.0.0.1:5557", False),
    ],
)
def test_where_a_publisher_binds(endpoint: str, bound: bool) -> None:
    assert binds(endpoint) is bound


@pytest.mark.parametrize(
    ("endpoint", "third"),
    [("tcp://*:5557", "tcp://*:5559"), ("tcp://*:0", "tcp://*:0"), ("ipc:///tmp/x", "ipc:///tmp/x_2")],
)
def test_ranks_and_engines_have_endpoints_of_their_own(endpoint: str, third: str) -> None:
    assert offset_endpoint(endpoint, 0) == endpoint
    assert offset_endpoint(endpoint, 2) == third


Receive = Callable[[], Awaitable[tuple[int, list[Any]]]]


class Ear:
    """A subscriber of one simulator."""

    def __init__(self, source: dict[str, Any]) -> None:
        context = zmq.asyncio.Context.instance()
        self.subscriber = context.socket(zmq.SUB)
        self.subscriber.subscribe(b"kv")
        self.subscriber.connect(source["endpoint"])
        self.dealer = context.socket(zmq.DEALER)
        self.dealer.connect(source["replay_endpoint"])

    async def hear(self) -> tuple[int, list[Any], int]:
        async with asyncio.timeout(5):
            topic, sequence, payload = await self.subscriber.recv_multipart()
        assert topic == b"kv"
        _, events, rank = msgspec.msgpack.decode(payload)
        return int.from_bytes(sequence, "big"), events, rank

    async def replay(self, start: int) -> list[int]:
        await self.dealer.send_multipart([b"", start.to_bytes(8, "big")])
        sequences: list[int] = []
        while True:
            async with asyncio.timeout(5):
                empty, topic, sequence, _ = await self.dealer.recv_multipart()
            assert empty == b""
            if sequence == b"\xff" * 8:
                assert topic == b""
                return sequences
            sequences.append(int.from_bytes(sequence, "big"))

    def close(self) -> None:
        self.subscriber.close(linger=0)
        self.dealer.close(linger=0)


@pytest.fixture
async def listen() -> AsyncIterator[Callable[[dict[str, Any]], Ear]]:
    ears: list[Ear] = []

    def start(source: dict[str, Any]) -> Ear:
        ears.append(Ear(source))
        return ears[-1]

    yield start
    for ear in ears:
        ear.close()


async def complete(simulator: Any, prompt: list[int], **headers: str) -> dict[str, Any]:
    body = {"model": "tiny", "prompt": prompt, "max_tokens": 2}
    async with simulator.client.post(
        f"{simulator.url}/v1/completions", json=body, headers=headers
    ) as response:
        content: dict[str, Any] = await response.json()
        assert response.status == 200, content
        return content


async def get(simulator: Any, method: str, path: str) -> Any:
    async with simulator.client.request(method, f"{simulator.url}{path}") as response:
        assert response.status == 200
        return await response.json()


async def join(simulator: Any, ear: Ear) -> int:
    """Publishes until the subscription has arrived; returns the next sequence number."""
    for number in itertools.count(10_000, 100):
        await complete(simulator, list(range(number, number + 20)))
        if await ear.subscriber.poll(20):
            break
    return (await ear.replay(0))[-1] + 1


async def next_heard(ear: Ear, sequence: int) -> tuple[list[Any], int]:
    heard, events, rank = await ear.hear()
    while heard < sequence:
        heard, events, rank = await ear.hear()
    assert heard == sequence
    return events, rank


async def test_events_replay_and_a_clearing_that_waits_for_the_next_step(
    serve: Serve, listen: Callable[[dict[str, Any]], Ear]
) -> None:
    simulator = await serve("--kv-events-config", CONFIGURATION, "--server-dev-mode")
    source = (await get(simulator, "GET", "/kv_event_sources"))["0"]
    ear = listen(source)
    assert await ear.replay(0) == []
    sequence = await join(simulator, ear)
    assert await ear.replay(0) == list(range(sequence))
    assert (await get(simulator, "POST", "/reset_prefix_cache")) == {"success": True}
    assert await ear.replay(sequence) == []
    await complete(simulator, list(range(100, 140)))
    events, rank = await next_heard(ear, sequence)
    assert rank == 0
    assert [event["type"] for event in events] == ["AllBlocksCleared", "BlockStored"]
    assert events[1]["token_ids"] == list(range(100, 132))
    assert await ear.replay(sequence) == [sequence]
    # A hit stores nothing anew, and a step without news is no message.
    await complete(simulator, list(range(100, 140)))
    assert await ear.replay(sequence) == [sequence]


async def test_the_positional_form(serve: Serve, listen: Callable[[dict[str, Any]], Ear]) -> None:
    simulator = await serve("--kv-events-config", CONFIGURATION, "--kv-events-positional")
    ear = listen(simulator.engine.kv_event_sources()["0"])
    sequence = await join(simulator, ear)
    await complete(simulator, list(range(20)))
    events, _ = await next_heard(ear, sequence)
    assert events[0][0] == "BlockStored"
    assert events[0][3] == list(range(16))


async def test_ranks_publish_for_themselves(serve: Serve, listen: Callable[[dict[str, Any]], Ear]) -> None:
    simulator = await serve("--kv-events-config", CONFIGURATION, "--data-parallel-size", "2")
    sources = await get(simulator, "GET", "/kv_event_sources")
    assert set(sources) == {"0", "1"}
    ear = listen(sources["1"])
    await complete(simulator, list(range(20)), **{"x-data-parallel-rank": "1"})
    assert await ear.replay(0) == [0]
    assert await listen(sources["0"]).replay(0) == []


async def test_without_a_configuration_there_is_no_source(serve: Serve) -> None:
    assert await get(await serve(), "GET", "/kv_event_sources") == {}
