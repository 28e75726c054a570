"""The approximate prefix index: which engine has probably cached which blocks.

In come the hash chains of requests as they are sent; out come, for a new chain, the number of its leading
blocks at each endpoint. Every endpoint is modelled as what its engine is: an LRU, the tail of a chain evicted
before its head. It remembers twice as many blocks as the KV cache has: what has just left a cache comes back
best to where it was, and whether an engine has it still is only guessed. A restarted engine is another
endpoint. All endpoints share one table from hash to a set of bits. It is bounded by bytes and does no I/O.

    hash  -> bits of the endpoints that hold it             (shared)
    hash  -> stamp of its latest use                        (per endpoint)
    log of (stamp, chain), oldest first                     (per endpoint)

Eviction takes the oldest chain of the log and drops those of its blocks that have not been used since. A
block is used with all before it and evicted before them, so that what an endpoint holds of a chain is always
a leading part of it: its end is found by bisection.
"""

from array import array
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from router.prefix.chain import Digest

Identity = tuple[str, str]

# `python -m tests.bench.prefix_index` measures 130 for a million; the rest is room for a growing table.
BYTES_PER_BLOCK = 192
# An engine with 24 GiB of KV cache for an 8-billion model holds about 200,000 tokens, 3,000 blocks; this is
# for engines that have not told theirs.
DEFAULT_CAPACITY_BLOCKS = 4096
# A log grows with repeated use of the same blocks; beyond this multiple of its capacity it is swept.
_LOG_FACTOR = 3
# Blocks that are remembered for each one of a KV cache. By `tests/bench/router_trace.py`, two seeds at 60
# requests a second, 1 loses a twentieth of the hit rate and a third of the median first token; 3 gains
# nothing more.
REMEMBERED = 2


class _Use:
    """One chain that was sent to an endpoint.

    Attributes:
        stamp: Of this use.
        chain: Its hashes. Never changed: the list may be the request's own.
        end: How many of them have not been forgotten.
    """

    __slots__ = ("chain", "end", "stamp")

    def __init__(self, stamp: int, chain: Sequence[Digest], end: int) -> None:
        self.stamp = stamp
        self.chain = chain
        self.end = end


class _Holdings:
    """What one endpoint probably holds.

    Attributes:
        bit: In the shared table.
        recent: Stamps from here on are of blocks that the cache has room for.
        filled: What is held, in caches of its engine.
        oldest: The stamp before all that is held.
        stamps: Of the latest use, by hash.
        log: Uses, oldest first.
        logged: Hashes in the log.
    """

    __slots__ = ("bit", "filled", "log", "logged", "oldest", "recent", "stamps")

    def __init__(self, bit: int) -> None:
        self.bit = bit
        self.recent = 0.0
        self.filled = 0.0
        self.oldest = -1
        self.stamps: dict[Digest, int] = {}
        self.log: deque[_Use] = deque()
        self.logged = 0


class PrefixIndex:
    """Remembers where chains of blocks were sent.

    Attributes:
        generation: Grows when endpoints get or lose their bits.
    """

    def __init__(self, *, bytes_max: int) -> None:
        """Takes the bound of its memory."""
        self._blocks_max = max(1, bytes_max // BYTES_PER_BLOCK)
        self._masks: dict[Digest, int] = {}
        self._holdings: dict[Identity, _Holdings] = {}
        self._stamp = 0
        self._total = 0
        self._of_bit: dict[int, _Holdings] = {}
        self.generation = 0

    def __len__(self) -> int:
        """Blocks, each counted once for every endpoint that holds it."""
        return self._total

    @property
    def estimated_bytes(self) -> int:
        """Memory that the blocks take, about."""
        return self._total * BYTES_PER_BLOCK

    @property
    def distinct_blocks(self) -> int:
        """Blocks in the shared table."""
        return len(self._masks)

    def blocks_at(self, identity: Identity) -> int:
        """Returns how many blocks an endpoint probably holds."""
        holdings = self._holdings.get(identity)
        return 0 if holdings is None else len(holdings.stamps)

    def match(self, chain: Sequence[int]) -> Mapping[Identity, int]:
        """Returns for each endpoint that holds the first block how many leading blocks it holds."""
        depths = self.depths(chain)
        return {
            identity: depths[holdings.bit]
            for identity, holdings in self._holdings.items()
            if holdings.bit in depths
        }

    def bits(self, identities: Iterable[Identity]) -> list[int]:
        """Returns the bits of endpoints, 0 for those without; they hold until `generation` changes."""
        held = self._holdings
        return [held[each].bit if each in held else 0 for each in identities]

    @property
    def recorded(self) -> int:
        """Chains that were recorded so far, wherever."""
        return self._stamp

    def pressures(self, bits: Iterable[int]) -> list[float]:
        """Returns for endpoints, by their bits, how fast their caches turn over; 0 without a bit.

        Formula: (held / capacity) / age, where age is that of the oldest block held: how much of the cache is
        filled anew for each chain that is recorded anywhere.
        """
        now, found = self._stamp, []
        for bit in bits:
            holdings = self._of_bit.get(bit)
            found.append(0.0 if holdings is None else holdings.filled / (now - holdings.oldest))
        return found

    def expected(self, chain: Sequence[Digest]) -> dict[int, int]:
        """Returns for each endpoint, by its bit, how many leading blocks count as cached there.

        Formula: (recent + remembered) / 2, in whole blocks. `recent` are those that the engine should still
        have: used after the stamp now - age * capacity / held, where age is that of the oldest block of all
        that are held; their share of the time is taken for their share of the blocks.
        """
        depths = self.depths(chain)
        if not depths:
            return depths
        for bit, depth in depths.items():
            holdings = self._of_bit[bit]
            if holdings.stamps[chain[depth - 1]] < holdings.recent:
                depths[bit] = (depth + _recent(holdings, chain, depth)) >> 1
        return depths

    def depths(self, chain: Sequence[Digest]) -> dict[int, int]:
        """Returns the same as `match`, by the bits of the endpoints."""
        found: dict[int, int] = {}
        if not chain:
            return found
        masks = self._masks
        alive = masks.get(chain[0], 0)
        low, end = 0, len(chain)
        while alive:
            # All of `alive` hold the block at `low`; `kept` are those of them that hold the one at `high`.
            high = end - 1
            kept = masks.get(chain[high], 0) & alive
            if kept == alive:
                high = end
                kept = 0
            else:
                while high - low > 1:
                    middle = (low + high) >> 1
                    at_middle = masks.get(chain[middle], 0) & alive
                    if at_middle == alive:
                        low = middle
                    else:
                        high, kept = middle, at_middle
            lost = alive ^ kept
            while lost:
                bit = lost & -lost
                found[bit] = high
                lost ^= bit
            alive, low = kept, high
        return found

    def record(self, identity: Identity, chain: Sequence[Digest], *, capacity_blocks: int) -> None:
        """Notes that an endpoint holds a chain from now on, and forgets what that pushes out.

        Args:
            identity: Endpoint and incarnation.
            chain: Hashes from the first block on; a list is kept and must not be changed.
            capacity_blocks: Blocks of the endpoint's KV cache.
        """
        if not chain:
            return
        holdings = self._holdings.get(identity)
        if holdings is None:
            holdings = self._holdings[identity] = _Holdings(self._free_bit())
            self._of_bit[holdings.bit] = holdings
            self.generation += 1
        self._stamp += 1
        blocks: list[Digest] = chain if isinstance(chain, list) else list(chain)
        self._learn(holdings, blocks)
        capacity = max(1, capacity_blocks)
        if len(holdings.stamps) > REMEMBERED * capacity:
            self._evict(holdings, REMEMBERED * capacity)
        while self._total > self._blocks_max:
            largest = max(self._holdings.values(), key=lambda each: len(each.stamps))
            self._evict(largest, len(largest.stamps) - (self._total - self._blocks_max))
        held = len(holdings.stamps)
        if holdings.logged > _LOG_FACTOR * held + len(blocks):
            _sweep(holdings)
        now = self._stamp
        # Nothing is left of it where all endpoints together hold more than the bytes allow.
        holdings.oldest = (holdings.log[0].stamp if holdings.log else now) - 1
        holdings.recent = now + 1 - (now - holdings.oldest) * capacity / held if held > capacity else 0.0
        holdings.filled = held / capacity

    def _learn(self, holdings: _Holdings, blocks: list[Digest]) -> None:
        """Enters a chain as used now."""
        masks, stamps = self._masks, holdings.stamps
        count, before = len(blocks), len(stamps)
        # As they go into tables, instead of made anew for each block.
        bit: Any = holdings.bit
        stamp: Any = self._stamp
        if blocks[0] not in stamps:
            held = 0
        elif blocks[-1] in stamps:
            held = count
        else:
            held = _held(stamps, blocks)
        if held < count and blocks[held] not in masks:
            # Whoever held a later block would hold this one.
            for digest in blocks[held:] if held else blocks:
                masks[digest] = bit
        elif held < count:
            for digest in blocks[held:] if held else blocks:
                masks[digest] = masks.get(digest, 0) | bit
        for digest in blocks:
            stamps[digest] = stamp
        self._total += len(stamps) - before
        # The tables hold the numbers of a new chain; those of a known one would be kept for the log alone,
        # where they take 44 bytes each instead of 8.
        kept: Sequence[Digest] = array("Q", blocks) if held else blocks
        holdings.log.append(_Use(self._stamp, kept, count))
        holdings.logged += count

    def retain(self, identities: Iterable[Identity]) -> None:
        """Forgets all other endpoints: those that left, and earlier incarnations."""
        kept = set(identities)
        for identity in [each for each in self._holdings if each not in kept]:
            self._evict(self._holdings[identity], 0)
            del self._of_bit[self._holdings[identity].bit]
            del self._holdings[identity]
            self.generation += 1

    def _free_bit(self) -> int:
        taken = 0
        for holdings in self._holdings.values():
            taken |= holdings.bit
        return ~taken & (taken + 1)

    def _evict(self, holdings: _Holdings, capacity_blocks: int) -> None:
        stamps, log = holdings.stamps, holdings.log
        excess = len(stamps) - capacity_blocks
        while excess > 0 and log:
            use = log[0]
            end = use.end
            # Blocks that were used again later are a leading part of the chain; the rest goes, tail first.
            used = _used_later(stamps, use)
            kept = max(used, end - excess)
            self._forget(holdings, use.chain[kept:end] if kept or end < len(use.chain) else use.chain)
            excess -= end - kept
            if kept == used:
                log.popleft()
                holdings.logged -= end
            else:
                holdings.logged -= end - kept
                use.end = kept

    def _forget(self, holdings: _Holdings, tail: Sequence[Digest]) -> None:
        if not tail:
            return
        masks, stamps, bit = self._masks, holdings.stamps, holdings.bit
        if masks[tail[0]] == bit:
            # Nobody else holds its first block, so nobody else holds any of it.
            for digest in tail:
                del stamps[digest]
                del masks[digest]
        else:
            for digest in tail:
                del stamps[digest]
                mask = masks[digest] & ~bit
                if mask:
                    masks[digest] = mask
                else:
                    del masks[digest]
        self._total -= len(tail)


def _used_later(stamps: dict[Digest, int], use: _Use) -> int:
    """Returns how many leading blocks of a chain have a later stamp."""
    chain, stamp = use.chain, use.stamp
    low, high = 0, use.end
    if high and stamps[chain[0]] == stamp:
        return 0
    while low < high:
        middle = (low + high) >> 1
        if stamps[chain[middle]] == stamp:
            high = middle
        else:
            low = middle + 1
    return low


def _recent(holdings: _Holdings, chain: Sequence[Digest], depth: int) -> int:
    """Returns how many leading blocks of those that are held are recent; the last of them is not."""
    stamps, since = holdings.stamps, holdings.recent
    low, high = 0, depth - 1
    while low < high:
        middle = (low + high) >> 1
        if stamps[chain[middle]] < since:
            high = middle
        else:
            low = middle + 1
    return low


def _held(stamps: dict[Digest, int], chain: list[Digest]) -> int:
    """Returns how many leading blocks of a chain are held: the first one is, the last one is not."""
    low, high = 0, len(chain) - 1
    while high - low > 1:
        middle = (low + high) >> 1
        if chain[middle] in stamps:
            low = middle
        else:
            high = middle
    return high


def _sweep(holdings: _Holdings) -> None:
    """Rewrites the log without the blocks that were used again later."""
    swept: deque[_Use] = deque()
    holdings.logged = 0
    for use in holdings.log:
        # What was used again is a leading part, as in `_evict`.
        used = _used_later(holdings.stamps, use)
        if used < use.end:
            live = use.chain[used : use.end] if used else use.chain
            swept.append(_Use(use.stamp, live, use.end - used))
            holdings.logged += use.end - used
    holdings.log = swept
