"""Policies of others as they have published them, to compare with in virtual time.

These are our own words for what their documents say, not their code, and no measurement of their programs.
"""

from collections.abc import Sequence

from router.picking.contract import Candidate, RequestContext


class CacheAware:
    """SGLang's cache_aware: the longest match above 0.3, the shortest queue where loads differ too much.

    Formula: with r = in_flight, where max(r) - min(r) > 64 and max(r) > 1.5 * min(r) the least r; else the
    longest match where it is more than 0.3 of the prompt; else the least r.
    """

    reads_prompt = True

    def score(self, request: RequestContext, candidates: Sequence[Candidate]) -> Sequence[float]:
        loads = [each.in_flight for each in candidates]
        matches = [each.cached_tokens for each in candidates]
        unbalanced = max(loads) - min(loads) > 64 and max(loads) > 1.5 * min(loads)
        if not unbalanced and max(matches) > 0.3 * request.prompt.tokens:
            return [float(each == max(matches)) for each in matches]
        return [float(each == min(loads)) for each in loads]


class Greedy:
    """Formula: least 8 * uncached + pending prefill + 20 * in_flight, in tokens."""

    reads_prompt = True

    def score(self, request: RequestContext, candidates: Sequence[Candidate]) -> Sequence[float]:
        costs = [
            8 * max(0, request.prompt.tokens - each.cached_tokens)
            + each.pending_prefill_tokens
            + 20 * each.in_flight
            for each in candidates
        ]
        return [(1 + min(costs)) / (1 + cost) for cost in costs]


POLICIES = {"published-cache-aware": CacheAware, "published-greedy": Greedy}
