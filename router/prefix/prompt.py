"""What routing knows of a prompt: its length and its hash chain.

In come a parsed body, the root of its tenant and the engines' block size, out comes a `Prompt`. Pure.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from router.prefix.canonical import canonical_prompt
from router.prefix.chain import BLOCKS_MAX, BYTES_PER_TOKEN, GRAIN_TOKENS, hash_chain, root_hash


class Prompt(NamedTuple):
    """A prompt as routing sees it.

    Attributes:
        tokens: Its length, about.
        block_tokens: Tokens that one hash adds.
        chain: Hashes of its full blocks, each with all before it.
        ratio: True tokens for each that its bytes suggest; 1 where they are not known.
    """

    tokens: int = 0
    block_tokens: int = GRAIN_TOKENS
    chain: Sequence[int] = ()
    ratio: float = 1.0

    def with_tokens(self, tokens: int) -> "Prompt":
        """Returns the same prompt with its true number of tokens."""
        return self._replace(tokens=tokens, ratio=tokens / self.tokens if self.tokens else 1.0)


NO_PROMPT = Prompt()


def read_prompt(
    document: Mapping[str, Any],
    *,
    namespace: str,
    deployment: str,
    adapter: str = "",
    block_tokens: int = GRAIN_TOKENS,
) -> Prompt:
    """Reads the prompt of a request.

    Args:
        document: Parsed body; its `cache_salt` isolates the prompt as it does in the engine.
        namespace: Tenant.
        deployment: Where it goes.
        adapter: LoRA adapter; empty for none.
        block_tokens: Tokens that one hash adds, from `routing_block_tokens`.
    """
    block_bytes = block_tokens * BYTES_PER_TOKEN
    text, length_bytes = canonical_prompt(document, bytes_max=BLOCKS_MAX * block_bytes)
    salt = document.get("cache_salt")
    root = root_hash(namespace, deployment, adapter=adapter, salt=salt if isinstance(salt, str) else "")
    return Prompt(
        tokens=-(-length_bytes // BYTES_PER_TOKEN),
        block_tokens=block_tokens,
        chain=hash_chain(root, text, block_bytes),
    )
