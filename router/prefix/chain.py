"""Chains of block hashes: one number stands for a block and everything before it.

In come the bytes of a prompt and the root of its tenant, out come 64-bit numbers, equal in every router
and worker: the seed is fixed. Model, adapter and salt are in the root, so that no tenant hits, or learns of,
another's prefixes. Pure.
"""

from collections.abc import Sequence
from itertools import accumulate

from xxhash import xxh64_intdigest

# English text and code have about four bytes a token in present tokenizers.
BYTES_PER_TOKEN = 4
# vLLM's block on GPUs, for engines that have not told theirs.
DEFAULT_BLOCK_TOKENS = 16
# 256 KiB of prompt in blocks of 64 bytes, about 0.8 ms of hashing. What lies beyond counts as not cached,
# at every endpoint alike.
BLOCKS_MAX = 4096

_SEED = 0


def root_hash(namespace: str, deployment: str, *, adapter: str = "", salt: str = "") -> int:
    """Returns the root of the chains of one tenant's deployment, adapter and cache salt."""
    text = f"{namespace}\0{deployment}\0{adapter}\0{salt}"
    return xxh64_intdigest(text.encode(errors="surrogatepass"), _SEED)


def hash_chain(root: int, prompt: bytes, block_bytes: int) -> Sequence[int]:
    """Hashes the full blocks of a prompt, each with all before it.

    Args:
        root: From `root_hash`.
        prompt: Canonical bytes.
        block_bytes: Length of a block; the engine's tokens a block times `BYTES_PER_TOKEN`.
    """
    end = min(len(prompt) // block_bytes, BLOCKS_MAX) * block_bytes
    blocks = [prompt[at : at + block_bytes] for at in range(0, end, block_bytes)]
    chain = accumulate(blocks, lambda parent, block: xxh64_intdigest(block, parent), initial=root)
    next(chain)
    return list(chain)
