"""Chains of block hashes: one number stands for a block and everything before it.

In come the bytes of a prompt and the root of its tenant, out come 64-bit numbers, equal in every router
and worker: the seed is fixed. Model, adapter and salt are in the root, so that no tenant hits, or learns of,
another's prefixes. Pure.
"""

from functools import lru_cache
from struct import Struct
from typing import Any

from xxhash import xxh64_intdigest

# A hash of a block, an `int`. Not declared as one: it is only looked up and handed on, and a compiled module
# would take every number apart and put it together again.
Digest = Any

# English text and code have about four bytes a token in present tokenizers.
BYTES_PER_TOKEN = 4
# vLLM's block on GPUs, for engines that have not told theirs.
DEFAULT_BLOCK_TOKENS = 16
# Routing counts in whole engine blocks of together at least this many tokens. Blocks of 16 would cost four
# times as much to hash, look up and remember, and tell of at most 48 tokens more, a few milliseconds of an
# engine; the figures of `tests/bench/router_trace.py` are the same for both.
GRAIN_TOKENS = 64
# 512 KiB of prompt in blocks of 256 bytes: hashing and learning them takes the loop 0.5 ms. What lies beyond
# counts as not cached, at every endpoint alike.
BLOCKS_MAX = 2048

# Blocks that one step cuts.
_GROUP_BLOCKS = 64
_SEED = 0


def root_hash(namespace: str, deployment: str, *, adapter: str = "", salt: str = "") -> int:
    """Returns the root of the chains of one tenant's deployment, adapter and cache salt."""
    # Salts are the clients' own, as many and as long as they like: they stay out of the cache.
    return (
        _root(namespace, deployment, adapter, salt) if salt else _plain_root(namespace, deployment, adapter)
    )


def _root(namespace: str, deployment: str, adapter: str, salt: str) -> int:
    text = f"{namespace}\0{deployment}\0{adapter}\0{salt}"
    return xxh64_intdigest(text.encode(errors="surrogatepass"), _SEED)


@lru_cache(maxsize=4096)
def _plain_root(namespace: str, deployment: str, adapter: str) -> int:
    return _root(namespace, deployment, adapter, "")


def routing_block_tokens(engine_block_tokens: int) -> int:
    """Returns the tokens of a block as routing counts them, for an engine's block."""
    return -(-GRAIN_TOKENS // engine_block_tokens) * engine_block_tokens


def hash_chain(root: int, prompt: bytes, block_bytes: int) -> list[Digest]:
    """Hashes the full blocks of a prompt, each with all before it.

    Args:
        root: From `root_hash`.
        prompt: Canonical bytes.
        block_bytes: Length of a block; the engine's tokens a block times `BYTES_PER_TOKEN`.
    """
    count = min(len(prompt) // block_bytes, BLOCKS_MAX)
    # Looked up once, and not for each block.
    digest_of: Any = xxh64_intdigest
    chain: list[Digest] = []
    seed: Digest = root
    done = 0
    while done < count:
        size = min(count - done, _GROUP_BLOCKS)
        for block in _cutter(size, block_bytes)(prompt, done * block_bytes):
            # Every hash is the seed of the next.
            seed = digest_of(block, seed)
            chain.append(seed)
        done += size
    return chain


@lru_cache(maxsize=8 * _GROUP_BLOCKS)
def _cutter(count: int, block_bytes: int) -> Any:
    """Returns what cuts bytes into blocks, from a position on; about 32 bytes a block are kept for each."""
    return Struct(f"{block_bytes}s" * count).unpack_from
