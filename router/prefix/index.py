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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

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


@dataclass(slots=True)
class _Holdings:
    """What one endpoint probably holds."""

    bit: int
    # Stamps from here on are of blocks that the cache has room for.
    recent: float = 0.0
    # What is held in caches of its engine, and the stamp before all of it.
    filled: float = 0.0
    oldest: int = -1
    stamps: dict[int, int] = field(default_factory=dict)
    log: deque[tuple[int, "array[int]"]] = field(default_factory=deque)
    logged: int = 0


class PrefixIndex:
    """Remembers where chains of blocks were sent.

    Attributes:
        generation: Grows when endpoints get or lose their bits.
    """

    def __init__(self, *, bytes_max: int) -> None:
        """Takes the bound of its memory."""
        self._blocks_max = max(1, bytes_max // BYTES_PER_BLOCK)
        self._masks: dict[int, int] = {}
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

    def bits(self, identities: Iterable[Identity]) -> Sequence[int]:
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
        now, of_bit = self._stamp, self._of_bit
        return [
            each.filled / (now - each.oldest) if (each := of_bit.get(bit)) is not None else 0.0
            for bit in bits
        ]

    def expected(self, chain: Sequence[int]) -> Mapping[int, int]:
        """Returns for each endpoint, by its bit, how many leading blocks count as cached there.

        Formula: (recent + remembered) / 2, in whole blocks. `recent` are those that the engine should still
        have: used after the stamp now - age * capacity / held, where age is that of the oldest block of all
        that are held; their share of the time is taken for their share of the blocks.
        """
        depths = self.depths(chain)
        for bit, depth in depths.items():
            holdings = self._of_bit[bit]
            if holdings.stamps[chain[depth - 1]] < holdings.recent:
                depths[bit] = (depth + _recent(holdings, chain, depth)) >> 1
        return depths

    def depths(self, chain: Sequence[int]) -> dict[int, int]:
        """Returns the same as `match`, by the bits of the endpoints."""
        mask_of = self._masks.get
        alive = mask_of(chain[0], 0) if chain else 0
        found: dict[int, int] = {}
        low, end = 0, len(chain)
        while alive:
            # All of `alive` hold the block at `low`; `kept` are those of them that hold the one at `high`.
            high = end - 1
            kept = mask_of(chain[high], 0) & alive
            if kept == alive:
                high = end
                kept = 0
            else:
                while high - low > 1:
                    middle = (low + high) >> 1
                    at_middle = mask_of(chain[middle], 0) & alive
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

    def record(self, identity: Identity, chain: Sequence[int], *, capacity_blocks: int) -> None:
        """Notes that an endpoint holds a chain from now on, and forgets what that pushes out.

        Args:
            identity: Endpoint and incarnation.
            chain: Hashes from the first block on.
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
        bit, masks, stamps = holdings.bit, self._masks, holdings.stamps
        if chain[-1] not in stamps:
            held = _held(stamps, chain)
            fresh = chain[held:] if held else chain
            if fresh[0] in masks:
                for digest in fresh:
                    masks[digest] = masks.get(digest, 0) | bit
            else:
                # Whoever held a later block would hold this one.
                masks.update(dict.fromkeys(fresh, bit))
        before = len(stamps)
        stamps.update(dict.fromkeys(chain, self._stamp))
        self._total += len(stamps) - before
        holdings.log.append((self._stamp, array("Q", chain)))
        holdings.logged += len(chain)
        capacity = max(1, capacity_blocks)
        self._evict(holdings, REMEMBERED * capacity)
        while self._total > self._blocks_max:
            largest = max(self._holdings.values(), key=lambda each: len(each.stamps))
            self._evict(largest, len(largest.stamps) - (self._total - self._blocks_max))
        if holdings.logged > _LOG_FACTOR * len(holdings.stamps) + len(chain):
            _sweep(holdings)
        held = len(stamps)
        # Nothing is left of it where all endpoints together hold more than the bytes allow.
        holdings.oldest = (holdings.log[0][0] if holdings.log else self._stamp) - 1
        age = self._stamp - holdings.oldest
        holdings.recent = self._stamp + 1 - age * capacity / held if held > capacity else 0.0
        holdings.filled = held / capacity

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
        excess = len(holdings.stamps) - capacity_blocks
        while excess > 0 and holdings.log:
            stamp, chain = holdings.log[0]
            # Blocks that were used again later are a leading part of the chain; the rest goes, tail first.
            used = _used_later(holdings.stamps, chain, stamp)
            kept = max(used, len(chain) - excess)
            self._forget(holdings, chain[kept:])
            excess -= len(chain) - kept
            if kept == used:
                holdings.log.popleft()
                holdings.logged -= len(chain)
            else:
                holdings.logged -= len(chain) - kept
                del chain[kept:]

    def _forget(self, holdings: _Holdings, tail: "array[int]") -> None:
        if not tail:
            return
        masks, bit = self._masks, holdings.bit
        _run(map(holdings.stamps.__delitem__, tail))
        if masks[tail[0]] == bit:
            # Nobody else holds its first block, so nobody else holds any of it.
            _run(map(masks.__delitem__, tail))
        else:
            for digest in tail:
                mask = masks[digest] & ~bit
                if mask:
                    masks[digest] = mask
                else:
                    del masks[digest]
        self._total -= len(tail)


def _run(calls: Iterator[None]) -> None:
    """Makes calls for what they do, without a line of Python for each."""
    deque(calls, maxlen=0)


def _used_later(stamps: Mapping[int, int], chain: Sequence[int], stamp: int) -> int:
    """Returns how many leading blocks of a chain have a later stamp."""
    low, high = 0, len(chain)
    while low < high:
        middle = (low + high) >> 1
        if stamps[chain[middle]] == stamp:
            high = middle
        else:
            low = middle + 1
    return low


def _recent(holdings: _Holdings, chain: Sequence[int], depth: int) -> int:
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


def _held(stamps: Mapping[int, int], chain: Sequence[int]) -> int:
    """Returns how many leading blocks of a chain are held; the last one is not."""
    if chain[0] not in stamps:
        return 0
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
    stamps = holdings.stamps
    swept: deque[tuple[int, array[int]]] = deque()
    holdings.logged = 0
    for stamp, chain in holdings.log:
        # What was used again is a leading part, as in `_evict`.
        used = _used_later(stamps, chain, stamp)
        live = chain[used:] if used else chain
        if live:
            swept.append((stamp, live))
            holdings.logged += len(live)
    holdings.log = swept
