"""Both wire forms, hashes as numbers and as bytes, and what is no batch."""

from typing import Any

import msgspec
import pytest

from nodeagent.kv_events.codec import Batch, Cleared, MalformedEventsError, Removed, Stored, decode_batch
from nodeagent.kv_events.reader import EventSource, read_sources

SEQUENCE = (7).to_bytes(8, "big")
DIGEST = bytes(range(32))
LOW = int.from_bytes(DIGEST[-8:], "big")


def decode(*events: Any) -> Batch:
    return decode_batch(SEQUENCE, msgspec.msgpack.encode([1.5, list(events), 0]))


def stored(**fields: Any) -> dict[str, Any]:
    return {
        "type": "BlockStored",
        "block_hashes": [1, 2],
        "parent_block_hash": None,
        "token_ids": [5, 6, 7, 8],
        "block_size": 2,
        "lora_id": None,
        "medium": "GPU",
        "lora_name": None,
        **fields,
    }


def test_the_map_form() -> None:
    batch = decode(
        stored(extra_keys=None, group_idx=0, kv_cache_spec_kind="full_attention", session_id="new"),
        {"type": "BlockRemoved", "block_hashes": [1], "medium": "GPU", "group_idx": 0},
        {"type": "AllBlocksCleared"},
    )
    assert (batch.sequence, batch.time_seconds) == (7, 1.5)
    assert batch.events == (
        Stored((1, 2), None, [5, 6, 7, 8], 2, plain=True, group=0, whole_prefix=True),
        Removed((1,), 0),
        Cleared(),
    )


def test_the_positional_form() -> None:
    batch = decode(
        ["BlockStored", [1, 2], None, [5, 6, 7, 8], 2, None, "GPU", None],
        ["BlockStored", [3], 2, [9, 9], 2, None],
        ["BlockRemoved", [1], "GPU"],
        ["BlockRemoved", [1]],
        ["AllBlocksCleared"],
    )
    assert batch.events == (
        Stored((1, 2), None, [5, 6, 7, 8], 2, plain=True, group=0, whole_prefix=True),
        Stored((3,), 2, [9, 9], 2, plain=True, group=0, whole_prefix=True),
        Removed((1,), None),
        Removed((1,), None),
        Cleared(),
    )


def test_whole_digests_are_cut_to_what_numbers_carry() -> None:
    (event,) = decode(stored(block_hashes=[DIGEST], parent_block_hash=DIGEST)).events
    assert isinstance(event, Stored)
    assert (event.hashes, event.parent) == ((LOW,), LOW)


def test_what_sets_blocks_apart_is_noted() -> None:
    events = decode(
        stored(extra_keys=[["tenant"], None]),
        stored(lora_name="a", lora_id=1),
        stored(kv_cache_spec_kind="sliding_window", group_idx=1),
    ).events
    assert [each.plain for each in events if isinstance(each, Stored)] == [False, False, True]
    assert [each.whole_prefix for each in events if isinstance(each, Stored)] == [True, True, False]


def test_other_media_and_unknown_events_are_left_out() -> None:
    assert decode(stored(medium="CPU"), {"type": "SomethingNew"}, ["SomethingNew", 1]).events == ()


@pytest.mark.parametrize(
    "payload",
    [
        b"\xc1",
        msgspec.msgpack.encode(7),
        msgspec.msgpack.encode([1.0]),
        msgspec.msgpack.encode([1.0, [{}], 0]),
        msgspec.msgpack.encode([1.0, [[]], 0]),
        msgspec.msgpack.encode([1.0, [stored(block_hashes=["x"])], 0]),
        msgspec.msgpack.encode([1.0, [stored(block_hashes=None)], 0]),
        msgspec.msgpack.encode(["soon", [], 0]),
    ],
)
def test_what_is_no_batch_is_refused(payload: bytes) -> None:
    with pytest.raises(MalformedEventsError):
        decode_batch(SEQUENCE, payload)


def test_a_sequence_number_has_eight_bytes() -> None:
    with pytest.raises(MalformedEventsError):
        decode_batch(b"1", msgspec.msgpack.encode([1.0, [], 0]))


def source(**fields: Any) -> dict[str, Any]:
    return {"enable_kv_cache_events": True, "publisher": "zmq", "endpoint": "ipc:///x", "topic": "", **fields}


@pytest.mark.parametrize(
    ("endpoint", "url", "reachable"),
    [
        ("tcp://*:5557", "http://10.0.0.1:8000", "tcp://10.0.0.1:5557"),
        ("tcp://*:5557", "http://[fd00::1]:8000", "tcp://[fd00::1]:5557"),
        ("tcp://[::]:5557", "http://10.0.0.1:8000", "tcp://10.0.0.1:5557"),
        ("tcp://10.0.0.1:40001", "http://10.0.0.1:8000", "tcp://10.0.0.1:40001"),
        ("ipc:///run/x.kv", "http://10.0.0.1:8000", "ipc:///run/x.kv"),
    ],
)
def test_where_a_source_is_reached(endpoint: str, url: str, reachable: str) -> None:
    sources = read_sources({"1": source(endpoint=endpoint, replay_endpoint=endpoint)}, url)
    assert sources == {1: EventSource(reachable, reachable, "")}


def test_sources_that_publish_nothing_or_cannot_be_read() -> None:
    assert read_sources({}, "http://x") == {}
    assert read_sources({"0": source(enable_kv_cache_events=False)}, "http://x") == {}
    contents: tuple[Any, ...] = ([], {"0": source(publisher="kafka")}, {"x": source()})
    for content in contents:
        with pytest.raises(ValueError, match=r"."):
            read_sources(content, "http://x")
