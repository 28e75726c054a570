"""KV blocks with a prefix cache: which blocks are held, which are free, which may be evicted.

In: hash chains of token blocks, requests to allocate, seal and release. Out: `Block` handles.
A block is held while a request references it. A sealed block (full, and so hashed) that nobody
holds stays cached and is evicted, least recently used first, only when no block is empty; it
counts as free, as in vLLM, so an idle engine with a hot cache reads usage 0.
Must not: know requests, time or tokens beyond the hashes it is given.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence


class Block:
    """One KV block: how many requests hold it, and its hash once it is sealed."""

    __slots__ = ("hash", "holders")

    def __init__(self) -> None:
        self.holders = 0
        self.hash: bytes | None = None


class BlockPool:
    """A fixed number of blocks; block_count includes the null block that is never given out.

    `on_evict` is told the hash of every cached block that makes room for another.
    """

    def __init__(self, block_count: int, on_evict: Callable[[bytes], object] = lambda _: None) -> None:
        self._on_evict = on_evict
        self._usable = block_count - 1
        self._empty = self._usable
        self._evictable: OrderedDict[bytes, Block] = OrderedDict()
        self._cached: dict[bytes, Block] = {}

    @property
    def usable_blocks(self) -> int:
        """Blocks that can be held at once."""
        return self._usable

    @property
    def free_blocks(self) -> int:
        """Blocks that an allocation may take: empty ones and evictable ones."""
        return self._empty + len(self._evictable)

    @property
    def held_blocks(self) -> int:
        """Blocks that at least one request holds."""
        return self._usable - self.free_blocks

    @property
    def cached_blocks(self) -> int:
        """Sealed blocks that a prefix may hit, held or not."""
        return len(self._cached)

    @property
    def usage_fraction(self) -> float:
        """Share of the blocks that is held, 0 to 1."""
        return self.held_blocks / self._usable

    def match(self, hashes: Sequence[bytes]) -> list[Block]:
        """The cached blocks of the longest prefix of the chain; nothing is held by asking."""
        blocks = []
        for digest in hashes:
            block = self._cached.get(digest)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def can_hold(self, hits: Sequence[Block], fresh: int) -> bool:
        """Whether `hits` can be taken out of the cache and `fresh` blocks beside them."""
        waking = sum(1 for block in hits if block.holders == 0)
        return fresh <= self.free_blocks - waking

    def hold(self, hits: Sequence[Block], fresh: int) -> list[Block] | None:
        """Takes the cached `hits` and `fresh` empty blocks; None, and nothing taken, if full."""
        if not self.can_hold(hits, fresh):
            return None
        for block in hits:
            if block.holders == 0 and block.hash is not None:
                del self._evictable[block.hash]
            block.holders += 1
        taken = list(hits)
        for _ in range(fresh):
            if self._empty:
                self._empty -= 1
            else:
                digest, _ = self._evictable.popitem(last=False)
                del self._cached[digest]
                self._on_evict(digest)
            block = Block()
            block.holders = 1
            taken.append(block)
        return taken

    def cached_hashes(self) -> set[bytes]:
        """The hashes that a prefix may hit."""
        return set(self._cached)

    def seal(self, block: Block, digest: bytes) -> bool:
        """Puts a full block into the cache; a twin that is already cached keeps its place (False)."""
        if block.hash is not None or digest in self._cached:
            return False
        block.hash = digest
        self._cached[digest] = block
        return True

    def clear(self) -> bool:
        """Forgets every cached block; False, and nothing forgotten, while one is held."""
        if self.held_blocks:
            return False
        self._empty = self._usable
        self._evictable.clear()
        self._cached.clear()
        return True

    def release(self, blocks: Sequence[Block]) -> None:
        """Gives a request's blocks back, its last block first to be evicted."""
        for block in reversed(blocks):
            block.holders -= 1
            if block.holders:
                continue
            if block.hash is None:
                self._empty += 1
            else:
                self._evictable[block.hash] = block
