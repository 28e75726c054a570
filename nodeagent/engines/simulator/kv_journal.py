"""What happened to cached blocks, in the order in which it happened.

In: blocks that were stored, evicted or cleared. Out: events for the publisher, taken once.
As in vLLM, events leave only with a step: an idle engine keeps what it has not told.
Must not: know sockets or encodings, or grow without an engine that steps (evictions need steps).
"""

from dataclasses import dataclass

from core.block_hash import ExtraKeys


@dataclass(frozen=True, slots=True)
class BlocksStored:
    """Consecutive blocks of one sequence that entered the cache.

    Attributes:
        digests: Their hashes, first block first.
        parent: Hash of the block before, None at the start of a chain.
        token_ids: The tokens of all of them.
        block_size_tokens: Tokens a block.
        lora_id: The adapter's number, None without one.
        lora_name: The adapter's name, None without one.
        extra_keys: What entered each hash beside tokens, None where nothing did.
    """

    digests: list[bytes]
    parent: bytes | None
    token_ids: list[int]
    block_size_tokens: int
    lora_id: int | None
    lora_name: str | None
    extra_keys: list[ExtraKeys | None]


@dataclass(frozen=True, slots=True)
class BlockRemoved:
    """A block that was evicted."""

    digest: bytes


@dataclass(frozen=True, slots=True)
class CacheCleared:
    """Every block left the cache at once."""


KvEvent = BlocksStored | BlockRemoved | CacheCleared


class KvJournal:
    """Events that have not been published yet; keeps nothing while it is off."""

    def __init__(self, *, enabled: bool) -> None:
        self.enabled = enabled
        self._events: list[KvEvent] = []

    def add(self, event: KvEvent) -> None:
        """Writes an event down."""
        if self.enabled:
            self._events.append(event)

    def take(self) -> list[KvEvent]:
        """The events since the last call."""
        events, self._events = self._events, []
        return events
