"""Block hashes as vLLM makes them, with the standard library alone.

In: a block's tokens, the hash of the block before, and what else sets a block apart. Out: the digest,
and the 64 bits of it that travel in events. A block's digest stands for its whole prefix, so a set of
digests is all that is needed to know which prefixes an engine holds.
Must not: import anything heavy; the simulator starts with it.
"""

import hashlib
import pickle
from collections.abc import Sequence

# vLLM 0.32 begins its chains with this constant, so replicas agree on every block's hash.
ROOT_HASH = hashlib.sha256(pickle.dumps("vllm-none-hash", protocol=5)).digest()

ExtraKeys = tuple[tuple[str, ...], ...]


def extra_keys(
    *, first: bool, cache_salt: str | None = None, lora: tuple[str, str] | None = None
) -> ExtraKeys | None:
    """What enters a block's hash beside its tokens.

    Args:
        first: Whether it is the first block of its chain; only that one holds the salt.
        cache_salt: The tenant's salt.
        lora: Name and path of the adapter; they enter every block.
    """
    keys: list[tuple[str, ...]] = []
    if lora is not None:
        keys.append(("lora", *lora))
    if first and cache_salt:
        keys.append(("cache_salt", cache_salt))
    return tuple(keys) or None


def block_hash(parent: bytes | None, token_ids: Sequence[int], extra: ExtraKeys | None = None) -> bytes:
    """The digest of one full block, as vLLM's `sha256` algorithm makes it.

    Args:
        parent: Digest of the block before, None for the first one.
        token_ids: The block's tokens.
        extra: From `extra_keys`.
    """
    key = (parent or ROOT_HASH, tuple(token_ids), extra)
    return hashlib.sha256(pickle.dumps(key, protocol=5)).digest()


def event_hash(digest: bytes) -> int:
    """The low 64 bits of a digest, as events carry them."""
    return int.from_bytes(digest[-8:], "big")
