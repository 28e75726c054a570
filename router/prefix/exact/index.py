"""The exact prefix index: for one request, how many of its tokens each engine has cached.

In come copies of caches and a prompt in engines' tokens, out come cached tokens by endpoint, None where they
are not known: there the approximate index stays in charge. Nothing is learned from what is sent; engines
tell.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from core.clock import Clock
from core.rpc import TlsFiles
from router.prefix.exact.copy import CacheCopy
from router.prefix.exact.follower import CacheFollower
from router.prefix.exact.tokens import ExactPrompt, PromptTokenizer
from router.view.view import Endpoint, EndpointState


class ExactIndex:
    """Follower and tokenizer of one worker; `run` must be running.

    Attributes:
        follower: Copies of caches.
    """

    def __init__(
        self,
        *,
        token: str,
        tls: TlsFiles | None,
        clock: Clock,
        tokenizer: PromptTokenizer | None = None,
    ) -> None:
        """Takes the router token that agents know."""
        self.follower = CacheFollower(token=token, tls=tls, clock=clock)
        self._tokenizer = tokenizer or PromptTokenizer(clock)
        self._clock = clock

    async def read_prompt(
        self, document: Mapping[str, Any], route: str, endpoints: Sequence[Endpoint]
    ) -> ExactPrompt | None:
        """Reads a prompt in engines' tokens, where an endpoint's cache is known; None where it is not."""
        sizes: set[int] = set()
        able = []
        for each in endpoints:
            copy = self._copy(each)
            if copy is not None:
                sizes.add(copy.block_tokens)
                if each.state is EndpointState.READY:
                    able.append(each)
        if not able:
            return None
        return await self._tokenizer.read(document, route, able, block_tokens=sizes)

    def cached_tokens(self, prompt: ExactPrompt, endpoints: Sequence[Endpoint]) -> Sequence[int | None]:
        """Returns how many of a prompt's tokens each endpoint takes from its cache; None is not known."""
        return [self._cached_at(prompt, each) for each in endpoints]

    def _cached_at(self, prompt: ExactPrompt, endpoint: Endpoint) -> int | None:
        copy = self._copy(endpoint)
        if copy is None:
            return None
        chain = prompt.chains.get(copy.block_tokens)
        if chain is None:
            # The engine's block was not known yet when the prompt was hashed.
            return None
        present = copy.leading_blocks(chain) * copy.block_tokens
        return min(present, prompt.hit_tokens_max(copy.block_tokens))

    def knows(self, endpoint: Endpoint) -> bool:
        """Tells whether an endpoint's cache is known now."""
        return self._copy(endpoint) is not None

    def blocks_at(self, replica: str) -> int:
        """Returns how many blocks the copy of a replica's cache holds."""
        copy = self.follower.copies.get(replica)
        return 0 if copy is None else len(copy)

    def _copy(self, endpoint: Endpoint) -> CacheCopy | None:
        copy = self.follower.copies.get(endpoint.replica)
        if copy is not None and copy.knows(endpoint.incarnation, self._clock.monotonic()):
            return copy
        return None

    async def run(self) -> None:
        """Follows the engines until cancelled."""
        await self.follower.run()

    async def close(self) -> None:
        """Closes connections to engines."""
        await self._tokenizer.close()
