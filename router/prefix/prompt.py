"""What routing knows of a prompt: its length and its hash chain.

In come a parsed body, the root of its tenant and the engines' block size, out comes a `Prompt`. Pure.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from router.prefix.canonical import canonical_prompt
from router.prefix.chain import BLOCKS_MAX, BYTES_PER_TOKEN, GRAIN_TOKENS, Digest, hash_chain, root_hash
from router.prefix.rendezvous import prefix_key


# Why `__init__` is written out stands in `picking.candidate`: every request makes one.
@dataclass(init=False, slots=True)
class Prompt:
    """A prompt as routing sees it; nobody changes it once it is made.

    Attributes:
        tokens: Its length, about.
        block_tokens: Tokens that one hash adds.
        chain: Hashes of its full blocks, each with all before it.
        ratio: True tokens for each that its bytes suggest; 1 where they are not known.
        key: Its `prefix_key`.
    """

    tokens: int
    block_tokens: int
    chain: Sequence[int]
    ratio: float
    key: Digest | None

    def __init__(
        self,
        tokens: int = 0,
        block_tokens: int = GRAIN_TOKENS,
        chain: Sequence[int] = (),
        ratio: float = 1.0,
    ) -> None:
        self.tokens = tokens
        self.block_tokens = block_tokens
        self.chain = chain
        self.ratio = ratio
        self.key = prefix_key(chain)

    def with_tokens(self, tokens: int) -> "Prompt":
        """Returns the same prompt with its true number of tokens."""
        ratio = tokens / self.tokens if self.tokens else 1.0
        return Prompt(tokens, self.block_tokens, self.chain, ratio)


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
    fields = document if isinstance(document, dict) else dict(document)
    block_bytes = block_tokens * BYTES_PER_TOKEN
    text, length_bytes = canonical_prompt(fields, bytes_max=BLOCKS_MAX * block_bytes)
    salt = fields.get("cache_salt")
    root = root_hash(namespace, deployment, adapter=adapter, salt=salt if isinstance(salt, str) else "")
    return Prompt(-(-length_bytes // BYTES_PER_TOKEN), block_tokens, hash_chain(root, text, block_bytes))
