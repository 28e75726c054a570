"""What a router gets: snapshot, changes, resumption, a new snapshot where it lags."""

import asyncio
from contextlib import aclosing

from millrace.agent.v1 import node_agent_service_pb2 as messages

from nodeagent.kv_events.codec import Removed, Stored
from nodeagent.kv_events.mirror import CacheMirror
from nodeagent.kv_events.stream import PART_HASHES, follow


def stored(*hashes: int) -> Stored:
    return Stored(hashes, None, [], 16, plain=False, group=0, whole_prefix=True)


async def take(mirror: CacheMirror, count: int, epoch: str = "", sequence: int = 0) -> list[str]:
    kinds: list[str] = []
    async with aclosing(follow(mirror, epoch, sequence, progress_seconds=0.01)) as stream:
        async for message in stream:
            kinds.append(message.WhichOneof("kind") or "")
            if len(kinds) == count:
                break
    return kinds


async def test_an_empty_cache_is_a_snapshot_too() -> None:
    assert await take(CacheMirror("run"), 3) == ["snapshot_part", "snapshot_end", "progress"]


async def test_a_large_cache_comes_in_parts_and_then_in_changes() -> None:
    mirror = CacheMirror("run")
    mirror.reset(complete=True)
    mirror.apply([stored(*range(2 * PART_HASHES + 1))])
    parts: list[int] = []
    async with aclosing(follow(mirror, "", 0)) as stream:
        async for message in stream:
            parts.extend(message.snapshot_part.block_hashes)
            if message.WhichOneof("kind") == "snapshot_end":
                assert message.snapshot_end == messages.KvSnapshotEnd(
                    incarnation="run", block_tokens=16, complete=True
                )
                break
        assert sorted(parts) == list(range(2 * PART_HASHES + 1))
        mirror.apply([Removed((1, 2), None), stored(10**12)])
        message = await anext(stream)
        assert sorted(message.change.removed_block_hashes) == [1, 2]
        assert list(message.change.stored_block_hashes) == [10**12]
        assert (message.epoch, message.sequence) == (mirror.epoch, mirror.sequence)


async def test_a_reader_goes_on_where_it_stopped() -> None:
    mirror = CacheMirror()
    mirror.apply([stored(1)])
    epoch, sequence = mirror.epoch, mirror.sequence
    mirror.apply([stored(2)])
    mirror.apply([stored(3)])
    assert await take(mirror, 3, epoch, sequence) == ["change", "change", "progress"]


async def test_a_reader_that_lags_or_comes_from_another_epoch_gets_a_snapshot() -> None:
    mirror = CacheMirror(changed_hashes_max=2)
    mirror.apply([stored(1)])
    epoch, sequence = mirror.epoch, mirror.sequence
    for number in range(2, 6):
        mirror.apply([stored(number)])
    assert (await take(mirror, 2, epoch, sequence))[-1] == "snapshot_end"
    assert (await take(mirror, 2, "another", mirror.sequence))[-1] == "snapshot_end"
    assert (await take(mirror, 2, mirror.epoch, mirror.sequence + 1))[-1] == "snapshot_end"


async def test_a_reset_while_following_brings_a_snapshot_and_the_end_ends_the_stream() -> None:
    mirror = CacheMirror()
    kinds: list[str] = []

    async def read() -> None:
        kinds.extend([message.WhichOneof("kind") or "" async for message in follow(mirror, "", 0)])

    reading = asyncio.create_task(read())
    await asyncio.sleep(0)
    mirror.reset(complete=True)
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    mirror.close()
    async with asyncio.timeout(5):
        await reading
    assert kinds == ["snapshot_part", "snapshot_end"] * 2
