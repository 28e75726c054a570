"""A prompt in an engine's own tokens and block hashes, asked of an engine itself.

In comes a parsed body, out come its token count and the chains of block hashes that vLLM makes of it, or None
where that is not to be had in time. `POST /tokenize` applies the engine's own chat template, so that there is
nothing to keep in step with it. Answers are kept by a digest of what was asked, bounded; a request waits
`WAIT_SECONDS` at most, and none waits where engines have not answered lately.
"""

import asyncio
from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp
import orjson
from xxhash import xxh3_128_digest

from core.backoff import Backoff, BackoffPolicy
from core.block_hash import block_hash, event_hash, extra_keys
from core.clock import Clock
from router.view.view import Endpoint

# What exact knowledge may cost a request. The approximate index answers at once.
WAIT_SECONDS = 0.005
# Hashing 1,000 tokens in blocks of 16 takes 80 to 200 us. Longer prompts are picked for approximately: their
# hit is large enough to be told that way.
TOKENS_MAX = 32_768
# Blocks that are hashed before others get the event loop, about 0.3 ms.
TURN_BLOCKS = 128
BODY_BYTES_MAX = 256 * 1024
# Prompts and hashes that are kept: 8 bytes a hash and about 300 a prompt.
PROMPTS_MAX = 8192
HASHES_MAX = 1_000_000
CONNECTIONS_MAX = 64
# Below the 5 s after which vLLM closes idle connections.
KEEP_ALIVE_SECONDS = 4.0
# How long nobody asks after engines did not answer in time.
_PAUSE = BackoffPolicy(initial_seconds=0.05, maximum_seconds=5.0, jitter_ratio=0.0)

_CHAT_ROUTE, _TEXT_ROUTE = "/v1/chat/completions", "/v1/completions"
# What `/tokenize` takes of a request, by route.
_FIELDS: Mapping[str, Sequence[str]] = {
    _CHAT_ROUTE: (
        *("messages", "tools", "chat_template", "chat_template_kwargs"),
        *("add_generation_prompt", "continue_final_message", "add_special_tokens"),
    ),
    _TEXT_ROUTE: ("prompt", "add_special_tokens"),
}
# What changes an engine's prompt and cannot be told `/tokenize`.
_UNKNOWABLE = (
    *("documents", "reasoning_effort", "truncate_prompt_tokens", "prompt_embeds", "mm_processor_kwargs"),
    *("media_io_kwargs", "suffix"),
)


@dataclass(frozen=True, slots=True)
class ExactPrompt:
    """A prompt as engines see it.

    Attributes:
        tokens: Its length.
        chains: Low 64 bits of its blocks' hashes, by the tokens of a block.
    """

    tokens: int
    chains: Mapping[int, Sequence[int]]

    def hit_tokens_max(self, block_tokens: int) -> int:
        """Returns the tokens that an engine with the whole prompt cached takes from its cache.

        The last token is always computed, since its logits are wanted.
        """
        return (self.tokens - 1) // block_tokens * block_tokens


class PromptTokenizer:
    """Asks engines for tokens; `close` ends its connections."""

    def __init__(self, clock: Clock, *, wait_seconds: float = WAIT_SECONDS) -> None:
        self._clock = clock
        self._wait_seconds = wait_seconds
        self._known: OrderedDict[bytes, ExactPrompt] = OrderedDict()
        self._hashes = 0
        self._pause = Backoff(_PAUSE)
        self._paused_until = float("-inf")
        self._session: aiohttp.ClientSession | None = None
        self._turn = 0

    async def read(
        self,
        document: Mapping[str, Any],
        route: str,
        endpoints: Sequence[Endpoint],
        *,
        block_tokens: Collection[int],
    ) -> ExactPrompt | None:
        """Reads a request's prompt.

        Args:
            document: Parsed body.
            route: Path that it came to.
            endpoints: Engines of one deployment that may be asked; at least one.
            block_tokens: Block sizes to hash for.

        Returns:
            None where the prompt cannot be known or was not known in time.
        """
        salt = document.get("cache_salt")
        if not isinstance(salt, str | None) or any(document.get(each) is not None for each in _UNKNOWABLE):
            return None
        told = _token_ids(document.get("prompt")) if route == _TEXT_ROUTE else None
        if told is not None:
            return await _hashed_in_turns(told, block_tokens, salt)
        asked = _question(document, route)
        if asked is None:
            return None
        key = _key(endpoints[0], block_tokens, salt, asked)
        known = self._known.get(key)
        if known is not None:
            self._known.move_to_end(key)
        elif self._clock.monotonic() >= self._paused_until:
            self._turn += 1
            tokens = await self._ask(endpoints[self._turn % len(endpoints)], asked)
            if tokens is not None:
                known = await _hashed_in_turns(tokens, block_tokens, salt)
                self._keep(key, known)
        return known

    async def close(self) -> None:
        """Closes the connections."""
        if self._session is not None:
            await self._session.close()

    async def _ask(self, endpoint: Endpoint, asked: bytes) -> Sequence[int] | None:
        """Asks one engine, within the time that a request may wait."""
        if self._session is None:
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=CONNECTIONS_MAX, keepalive_timeout=KEEP_ALIVE_SECONDS)
            )
        body = asked
        if endpoint.served_model_name:
            body = b'{"model":' + orjson.dumps(endpoint.served_model_name) + b"," + asked[1:]
        try:
            async with (
                asyncio.timeout(self._wait_seconds),
                self._session.post(
                    f"{endpoint.url}/tokenize", data=body, headers={"Content-Type": "application/json"}
                ) as answer,
            ):
                content = orjson.loads(await answer.read()) if answer.status == 200 else None
        except (TimeoutError, aiohttp.ClientError, OSError, orjson.JSONDecodeError):
            self._paused_until = self._clock.monotonic() + self._pause.failed()
            return None
        self._pause.succeeded()
        return _token_ids(content.get("tokens")) if isinstance(content, dict) else None

    def _keep(self, key: bytes, prompt: ExactPrompt) -> None:
        if key in self._known:
            # Two requests asked at the same time.
            return
        self._known[key] = prompt
        self._hashes += _size(prompt)
        while len(self._known) > PROMPTS_MAX or self._hashes > HASHES_MAX:
            _, oldest = self._known.popitem(last=False)
            self._hashes -= _size(oldest)


def _question(document: Mapping[str, Any], route: str) -> bytes | None:
    """Returns the body for `/tokenize` without its model; None where it cannot tell the prompt."""
    if route == _CHAT_ROUTE:
        messages = document.get("messages")
        # Images and recordings enter hashes by keys of their own.
        if not isinstance(messages, list) or not all(map(_is_text, messages)):
            return None
    elif route != _TEXT_ROUTE or not isinstance(document.get("prompt"), str):
        return None
    try:
        asked = orjson.dumps({name: document[name] for name in _FIELDS[route] if name in document})
    except orjson.JSONEncodeError:
        return None
    return asked if len(asked) <= BODY_BYTES_MAX else None


def _key(endpoint: Endpoint, block_tokens: Collection[int], salt: str | None, asked: bytes) -> bytes:
    sizes = ",".join(map(str, sorted(block_tokens)))
    head = f"{endpoint.namespace}\0{endpoint.deployment}\0{sizes}\0{salt or ''}\0"
    return xxh3_128_digest(head.encode(errors="surrogatepass") + asked)


def _is_text(message: Any) -> bool:
    if not isinstance(message, dict):
        return False
    content = message.get("content")
    return not isinstance(content, list) or all(
        isinstance(part, dict) and part.get("type") == "text" for part in content
    )


def _token_ids(value: Any) -> Sequence[int] | None:
    """Returns what are token ids, of which there is at least one and not too many; None for all else."""
    if not isinstance(value, list) or not 0 < len(value) <= TOKENS_MAX:
        return None
    return value if all(type(each) is int and each >= 0 for each in value) else None


def hashed(tokens: Sequence[int], block_tokens: Collection[int], salt: str | None) -> ExactPrompt:
    """Hashes a prompt as vLLM does, in blocks of each size."""
    return ExactPrompt(len(tokens), {size: list(_hashes(tokens, size, salt)) for size in block_tokens})


async def _hashed_in_turns(
    tokens: Sequence[int], block_tokens: Collection[int], salt: str | None
) -> ExactPrompt:
    """Does the same, and lets others have the event loop in between."""
    chains: dict[int, Sequence[int]] = {}
    for size in block_tokens:
        chain: list[int] = []
        for digest in _hashes(tokens, size, salt):
            chain.append(digest)
            if len(chain) % TURN_BLOCKS == 0:
                await asyncio.sleep(0)
        chains[size] = chain
    return ExactPrompt(len(tokens), chains)


def _hashes(tokens: Sequence[int], size: int, salt: str | None) -> Iterator[int]:
    parent: bytes | None = None
    for at in range(0, len(tokens) // size * size, size):
        parent = block_hash(parent, tokens[at : at + size], extra_keys(first=at == 0, cache_salt=salt))
        yield event_hash(parent)


def _size(prompt: ExactPrompt) -> int:
    return sum(map(len, prompt.chains.values()))
