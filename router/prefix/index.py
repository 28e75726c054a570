"""The approximate prefix index: which engine has probably cached which blocks.

In come the hash chains of requests as they are sent; out come, for a new chain, the number of its leading
blocks at each endpoint. Every endpoint is modelled as what its engine is: an LRU of as many blocks as its
KV cache has, the tail of a chain evicted before its head. A restarted engine is another endpoint. All
endpoints share one table from hash to a set of bits, so that a look-up is one walk. It is bounded by bytes
and does no I/O.

    hash  -> bits of the endpoints that hold it             (shared)
    hash  -> stamp of its latest use                        (per endpoint)
    log of (stamp, chain), oldest first                     (per endpoint)

Eviction takes the oldest chain of the log and drops those of its blocks that have not been used since.
"""

from array import array
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

Identity = tuple[str, str]

# `python -m tests.bench.prefix_index` measures 130 for a million; the rest is room for a growing table.
BYTES_PER_BLOCK = 192
# An engine with 24 GiB of KV cache for an 8-billion model holds about 12,000 blocks of 16 tokens; this is
# for engines that have not told theirs.
DEFAULT_CAPACITY_BLOCKS = 16_384
# A log grows with repeated use of the same blocks; beyond this multiple of its capacity it is swept.
_LOG_FACTOR = 3


@dataclass(slots=True)
class _Holdings:
    """What one endpoint probably holds."""

    bit: int
    stamps: dict[int, int] = field(default_factory=dict)
    log: deque[tuple[int, "array[int]"]] = field(default_factory=deque)
    logged: int = 0


class PrefixIndex:
    """Remembers where chains of blocks were sent."""

    def __init__(self, *, bytes_max: int) -> None:
        """Takes the bound of its memory."""
        self._blocks_max = max(1, bytes_max // BYTES_PER_BLOCK)
        self._masks: dict[int, int] = {}
        self._holdings: dict[Identity, _Holdings] = {}
        self._stamp = 0
        self._total = 0

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
        masks = self._masks
        alive = masks.get(chain[0], 0) if chain else 0
        if not alive:
            return {}
        lengths: dict[int, int] = {}
        depth = 0
        for digest in chain:
            kept = masks.get(digest, 0) & alive
            if kept != alive:
                lost = alive ^ kept
                while lost:
                    bit = lost & -lost
                    lengths[bit] = depth
                    lost ^= bit
                alive = kept
                if not alive:
                    break
            depth += 1
        return {
            identity: lengths.get(holdings.bit, depth)
            for identity, holdings in self._holdings.items()
            if holdings.bit & alive or holdings.bit in lengths
        }

    def record(self, identity: Identity, chain: Sequence[int], *, capacity_blocks: int) -> None:
        """Notes that an endpoint holds a chain from now on, and evicts what that pushes out.

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
        self._stamp += 1
        bit, masks = holdings.bit, self._masks
        before = len(holdings.stamps)
        holdings.stamps.update(dict.fromkeys(chain, self._stamp))
        self._total += len(holdings.stamps) - before
        for digest in chain:
            mask = masks.get(digest, 0)
            if not mask & bit:
                masks[digest] = mask | bit
        holdings.log.append((self._stamp, array("Q", chain)))
        holdings.logged += len(chain)
        self._evict(holdings, max(1, capacity_blocks))
        while self._total > self._blocks_max:
            largest = max(self._holdings.values(), key=lambda each: len(each.stamps))
            self._evict(largest, len(largest.stamps) - (self._total - self._blocks_max))
        if holdings.logged > _LOG_FACTOR * len(holdings.stamps) + len(chain):
            _sweep(holdings)

    def retain(self, identities: Iterable[Identity]) -> None:
        """Forgets all other endpoints: those that left, and earlier incarnations."""
        kept = set(identities)
        for identity in [each for each in self._holdings if each not in kept]:
            self._evict(self._holdings[identity], 0)
            del self._holdings[identity]

    def _free_bit(self) -> int:
        taken = 0
        for holdings in self._holdings.values():
            taken |= holdings.bit
        return ~taken & (taken + 1)

    def _evict(self, holdings: _Holdings, capacity_blocks: int) -> None:
        stamps, masks, bit, log = holdings.stamps, self._masks, holdings.bit, holdings.log
        excess = len(stamps) - capacity_blocks
        if excess <= 0:
            return
        left = excess
        while left > 0 and log:
            stamp, chain = log[0]
            while chain and left > 0:
                digest = chain.pop()
                holdings.logged -= 1
                if stamps.get(digest) != stamp:
                    continue
                del stamps[digest]
                left -= 1
                mask = masks[digest] & ~bit
                if mask:
                    masks[digest] = mask
                else:
                    del masks[digest]
            if not chain:
                log.popleft()
        self._total -= excess - left


def _sweep(holdings: _Holdings) -> None:
    """Rewrites the log without the blocks that were used again later."""
    stamps = holdings.stamps
    swept: deque[tuple[int, array[int]]] = deque()
    holdings.logged = 0
    for stamp, chain in holdings.log:
        live = array("Q", [digest for digest in chain if stamps.get(digest) == stamp])
        if live:
            swept.append((stamp, live))
            holdings.logged += len(live)
    holdings.log = swept
