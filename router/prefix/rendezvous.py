"""Agreement without talking: every router ranks the endpoints alike for the same prefix.

In come a chain (or any text) and names, out come numbers: the endpoint with the greatest is the first
choice, and when one comes or goes only its own share moves. Pure.
"""

from collections.abc import Sequence
from itertools import repeat

from xxhash import xxh64_intdigest

from router.prefix.chain import Digest

# Leading blocks that make the key of a prompt: enough to tell conversations with a common system prompt
# apart, few enough that later turns of one conversation have the same key: 256 tokens on most engines.
KEY_BLOCKS_MAX = 4

_SCALE = float(1 << 64)


def prefix_key(chain: Sequence[Digest]) -> Digest | None:
    """Returns the key of a prompt; None for one without a full block.

    The depth is the greatest power of two that the prompt reaches, so that short prompts have a key, too.
    """
    count = len(chain)
    if not count:
        return None
    depth = 1
    while 2 * depth <= count and 2 * depth <= KEY_BLOCKS_MAX:
        depth *= 2
    return chain[depth - 1]


def text_key(text: str) -> int:
    """Returns the key of a text, such as a session id."""
    return xxh64_intdigest(text.encode(errors="surrogatepass"), 0)


def rank(key: int, name: str) -> float:
    """Returns the rank of a name for a key, 0 to 1; evenly spread."""
    return xxh64_intdigest(name.encode(), key) / _SCALE


def preference(chain: Sequence[int], names: Sequence[str]) -> Sequence[int]:
    """Returns the positions of the names in the rendezvous order of a prompt, the first choice first.

    Empty for a prompt without a full block.
    """
    key = prefix_key(chain)
    if key is None:
        return ()
    return sorted(
        range(len(names)), key=digests(key, [each.encode() for each in names]).__getitem__, reverse=True
    )


def digests(key: Digest, names: Sequence[bytes]) -> list[Digest]:
    """Returns what the rendezvous order of a key sorts names by, the greatest first."""
    return list(map(xxh64_intdigest, names, repeat(key)))
