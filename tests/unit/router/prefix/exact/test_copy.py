"""A router's copy of a cache against the agent's own stream of it."""

import asyncio

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from millrace.agent.v1 import node_agent_service_pb2 as messages

from core.block_hash import block_hash, event_hash
from nodeagent.kv_events.codec import Cleared, Event, Removed, Stored
from nodeagent.kv_events.mirror import CacheMirror
from nodeagent.kv_events.stream import follow
from router.prefix.exact.copy import SILENCE_SECONDS_MAX, CacheCopy, MalformedStreamError

TOKENS = tuple(range(16))
FIRST = event_hash(block_hash(None, TOKENS))


def _stored(*hashes: int, parent: int | None = 1) -> Stored:
    return Stored(hashes, parent, TOKENS * len(hashes), 16, True, 0, True)


def _mirror() -> CacheMirror:
    mirror = CacheMirror("run-1", changed_hashes_max=12)
    mirror.reset(complete=True)
    mirror.apply([_stored(FIRST, parent=None)])
    return mirror


async def _catch_up(copy: CacheCopy, mirror: CacheMirror) -> None:
    """Opens a stream where the copy stopped, and reads until it says that nothing is new."""
    copy.begin_stream()
    async for message in follow(mirror, copy.epoch, copy.sequence, progress_seconds=0.0):
        if message.WhichOneof("kind") == "progress":
            return
        copy.apply(message, 0.0)


_hashes = st.lists(st.integers(1, 30), min_size=1, max_size=6, unique=True).map(tuple)
_events = st.one_of(
    _hashes.map(lambda hashes: _stored(*hashes)),
    _hashes.map(lambda hashes: Removed(hashes, None)),
    st.just(Cleared()),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.lists(_events, max_size=3), max_size=5), max_size=5), st.booleans())
def test_it_holds_what_the_engine_holds_however_streams_break(
    rounds: list[list[list[Event]]], lost: bool
) -> None:
    async def run() -> None:
        mirror, copy = _mirror(), CacheCopy()
        for at, steps in enumerate(rounds):
            for events in steps:
                mirror.apply(events)
            if lost and at == 1:
                mirror.reset(complete=False)
            await _catch_up(copy, mirror)
            assert copy._present == mirror.present()
            assert copy.knows("run-1", 0.0) == mirror.complete

    asyncio.run(run())


async def test_it_counts_leading_blocks_only() -> None:
    mirror, copy = _mirror(), CacheCopy()
    mirror.apply([_stored(2, 3, 5)])
    await _catch_up(copy, mirror)
    assert copy.leading_blocks((FIRST, 2, 3, 4, 5)) == 3
    assert copy.leading_blocks((4, 2)) == copy.leading_blocks(()) == 0
    assert copy.block_tokens == 16


async def test_it_is_believed_about_one_run_and_not_after_silence() -> None:
    copy = CacheCopy()
    assert not copy.knows("", 0.0)
    await _catch_up(copy, _mirror())
    assert copy.knows("run-1", SILENCE_SECONDS_MAX)
    assert not copy.knows("run-2", 0.0)
    assert not copy.knows("run-1", SILENCE_SECONDS_MAX + 1)


@pytest.mark.parametrize("scheme", [messages.KV_HASH_SCHEME_UNSPECIFIED, messages.KV_HASH_SCHEME_OTHER])
def test_hashes_that_cannot_be_worked_out_tell_nothing(scheme: messages.KvHashScheme.ValueType) -> None:
    copy = CacheCopy()
    copy.apply(_part("e", 5, 1), 0.0)
    assert not copy.knows("run-1", 0.0)
    copy.apply(_end("e", 5, scheme), 0.0)
    assert not copy.knows("run-1", 0.0)


def test_a_stream_that_breaks_amid_a_snapshot_begins_anew() -> None:
    copy = CacheCopy()
    copy.apply(_part("e", 5, 1, 2), 0.0)
    copy.begin_stream()
    assert (copy.epoch, copy.sequence) == ("", 0)
    copy.apply(_part("e", 6, 2), 0.0)
    copy.apply(_end("e", 6), 0.0)
    assert copy.leading_blocks((1,)) == 0
    assert copy.leading_blocks((2,)) == 1


def test_what_does_not_follow_costs_all_that_was_known() -> None:
    wrong = [
        messages.StreamKvEventsResponse(epoch="e", sequence=8, change=messages.KvChange()),
        messages.StreamKvEventsResponse(epoch="f", sequence=6, change=messages.KvChange()),
        _end("e", 6),
    ]
    for message in wrong:
        copy = CacheCopy()
        copy.apply(_part("e", 5, 1), 0.0)
        copy.apply(_end("e", 5), 0.0)
        assert copy.knows("run-1", 0.0)
        with pytest.raises(MalformedStreamError):
            copy.apply(message, 0.0)
        assert not copy.knows("run-1", 0.0)
        assert (copy.epoch, len(copy)) == ("", 0)


def _part(epoch: str, sequence: int, *hashes: int) -> messages.StreamKvEventsResponse:
    part = messages.KvSnapshotPart(block_hashes=hashes)
    return messages.StreamKvEventsResponse(epoch=epoch, sequence=sequence, snapshot_part=part)


def _end(
    epoch: str,
    sequence: int,
    scheme: messages.KvHashScheme.ValueType = messages.KV_HASH_SCHEME_SHA256_PICKLE,
) -> messages.StreamKvEventsResponse:
    end = messages.KvSnapshotEnd(incarnation="run-1", block_tokens=16, hash_scheme=scheme, complete=True)
    return messages.StreamKvEventsResponse(epoch=epoch, sequence=sequence, snapshot_end=end)
