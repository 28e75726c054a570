"""Reads KV events off the wire: vLLM's map form, and the positional form of older engines.

In: msgpack payloads. Out: batches of stored, removed and cleared blocks, every block known by the low 64
bits of its hash, whichever form and length it travelled in. Fields that are not needed are not looked at,
so that engines may add some.
Must not: keep state or touch sockets.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

# The kinds of cache groups whose blocks stand for whole prefixes; absent means the only group there is.
_WHOLE_PREFIX_KINDS = frozenset({None, "full_attention", "mla_attention"})
# Where a prefix hit costs nothing; other media need a load first. Older engines say nothing.
_DEVICE_MEDIA = frozenset({None, "GPU"})

# Places of the positional form.
_STORED_FIELDS = (
    *("type", "block_hashes", "parent_block_hash", "token_ids", "block_size", "lora_id", "medium"),
    *("lora_name", "extra_keys", "group_idx", "kv_cache_spec_kind"),
)
_REMOVED_FIELDS = ("type", "block_hashes", "medium", "group_idx")


class MalformedEventsError(ValueError):
    """A message that is no batch of KV events."""


@dataclass(frozen=True, slots=True)
class Stored:
    """Blocks that entered the cache.

    Attributes:
        hashes: Low 64 bits of their hashes.
        parent: The block before, None at the start of a chain.
        token_ids: Tokens of all of them.
        block_tokens: Tokens a block.
        plain: True where nothing but tokens entered the hashes.
        group: Cache group.
        whole_prefix: False for groups whose blocks do not stand for whole prefixes.
    """

    hashes: tuple[int, ...]
    parent: int | None
    token_ids: Sequence[int]
    block_tokens: int
    plain: bool
    group: int
    whole_prefix: bool


@dataclass(frozen=True, slots=True)
class Removed:
    """Blocks that left the cache; group None means every group."""

    hashes: tuple[int, ...]
    group: int | None


@dataclass(frozen=True, slots=True)
class Cleared:
    """Every block left the cache."""


Event = Stored | Removed | Cleared


@dataclass(frozen=True, slots=True)
class Batch:
    """What one step of the engine did.

    Attributes:
        sequence: From 0 in every process of the engine.
        time_seconds: The engine's clock; tells batches of different processes apart.
        events: In order.
    """

    sequence: int
    time_seconds: float
    events: tuple[Event, ...]


def decode_batch(sequence: bytes, payload: bytes) -> Batch:
    """Reads one message.

    Raises:
        MalformedEventsError: It is none.
    """
    try:
        content = msgspec.msgpack.decode(payload)
        time_seconds, events = float(content[0]), content[1]
        read = tuple(event for event in map(_event, events) if event is not None)
    except (msgspec.DecodeError, LookupError, TypeError, ValueError, AttributeError) as error:
        raise MalformedEventsError(f"{type(error).__name__}: {error}") from error
    if len(sequence) != 8:
        raise MalformedEventsError(f"a sequence number of {len(sequence)} bytes")
    return Batch(int.from_bytes(sequence, "big"), time_seconds, read)


def _event(raw: Any) -> Event | None:
    if isinstance(raw, Mapping):
        kind = raw["type"]
        fields = raw
    else:
        kind = raw[0]
        names = _STORED_FIELDS if kind == "BlockStored" else _REMOVED_FIELDS
        # Places beyond the known ones belong to engines of other ages.
        fields = dict(zip(names, raw, strict=False))
    if kind == "AllBlocksCleared":
        return Cleared()
    if kind not in {"BlockStored", "BlockRemoved"} or fields.get("medium") not in _DEVICE_MEDIA:
        return None
    hashes = tuple(map(_hash, fields["block_hashes"]))
    group = fields.get("group_idx")
    if kind == "BlockRemoved":
        return Removed(hashes, group)
    parent = fields["parent_block_hash"]
    extra = fields.get("extra_keys")
    return Stored(
        hashes=hashes,
        parent=_hash(parent) if parent is not None else None,
        token_ids=fields["token_ids"],
        block_tokens=int(fields["block_size"]),
        plain=fields.get("lora_id") is None and fields.get("lora_name") is None and not any(extra or ()),
        group=group or 0,
        whole_prefix=fields.get("kv_cache_spec_kind") in _WHOLE_PREFIX_KINDS,
    )


def _hash(value: Any) -> int:
    if isinstance(value, bytes):
        return int.from_bytes(value[-8:], "big")
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"a hash of type {type(value).__name__}")
    return value & 0xFFFF_FFFF_FFFF_FFFF
