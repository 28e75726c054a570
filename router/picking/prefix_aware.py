"""Prefix-aware: the engine that has most of the prompt cached; for a new prompt, the one all agree on.

Formula, for each candidate:

    hit   = cached_tokens / prompt_tokens
    score = hit                                      where any candidate has a hit
    score = 0.1 for the first in rendezvous order of the prompt's key, else 0   where none has

The key is the chain's hash after at most 16 blocks, so that every router and worker sends the same new
prefix to the same place. Use it behind `hot-spot-guard`: by itself it piles a common prefix on one engine.
"""

from collections.abc import Sequence

from router.picking.contract import Candidate, RequestContext
from router.prefix.rendezvous import preference

# Decides alone, and gives way to load in a weighted sum.
COLD = 0.1


class PrefixAware:
    """Scorer that prefers cached prefixes."""

    reads_prompt = True
    affine = True

    def score(self, request: RequestContext, candidates: Sequence[Candidate]) -> Sequence[float]:
        """Returns the share of the prompt that is cached, or the common choice for a new prompt."""
        tokens = request.prompt.tokens
        if any(each.cached_tokens for each in candidates):
            return [min(1.0, each.cached_tokens / tokens) for each in candidates]
        order = preference(request.prompt.chain, [each.endpoint.replica for each in candidates])
        return [COLD if order and at == order[0] else 0.0 for at in range(len(candidates))]
