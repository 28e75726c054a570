"""Least cost: prefix and load in one number, counted in prompt tokens; what the default is made of.

Formula, for each candidate:

    uncached = prompt_tokens - cached_tokens
    likely   = 1 - D * others        for the first in rendezvous order of the prompt's key
               1 - D/4 * others      for the second
               1                     for the rest,                               with D = 0.8
    pressure = cache_pressure / mean cache_pressure,  0 where nothing is known of any
    dearer   = 1 + P * pressure                                                             with P = 0.1
    cost     = 16 * uncached * likely * dearer + pending_prefill_tokens / weight + 20 * requests
    score    = (1 + min cost) / (1 + cost)

A token that has to be computed costs the request once and, on a busy engine, everyone behind it; that is
why it weighs so much more than a token that waits already. `pending_prefill_tokens` and `requests` count
what this process has sent, before it is sent; `requests` adds others' from samples; both are divided by the
relative weight (`pending`).

What is computed anew pushes something out of that cache, which its owner then has to compute again: the
likelier, the faster the cache turns over. So new prefixes settle where there is room for them, and known
ones stay, because what is cached pushes nothing out.

`others` is the share of the load that other routers and workers send. What they have sent where is not
known here, but they rank the endpoints of a prompt as this process does: the more of the load is theirs,
the likelier the first choice holds a prefix that this process has never seen. A lone router gives no such
discount, because it would only unbalance the load. Missing and stale samples are neutral.
"""

from collections.abc import Sequence

from router.picking.contract import Candidate, RequestContext
from router.picking.pending import others_share, pending_requests, relative_weights
from router.prefix.rendezvous import preference

# From `tests/bench/router_trace.py`, three seeds at 60 requests a second on one trace: 8 loses a twentieth
# of the hit rate and about a quarter of the first token at overload; 24 gains nothing more.
UNCACHED_WEIGHT = 16.0
REQUEST_TOKENS = 20.0
# From `tests/bench/router_chats.py`: 0.1 brings engines of unequal speed to the hit rate of equal ones.
PRESSURE_WEIGHT = 0.1
# By place in the rendezvous order. Without them two routers keep 0.16 of 0.25 hit rate, with them 0.23.
DISCOUNTS = (0.8, 0.2)


class LeastCost:
    """Scorer that predicts the work that a request brings."""

    reads_prompt = True
    affine = True

    def score(self, request: RequestContext, candidates: Sequence[Candidate]) -> Sequence[float]:
        """Returns 1 for the cheapest candidate, less for dearer ones."""
        tokens = request.prompt.tokens
        weights = uncached_weights([each.cache_pressure for each in candidates])
        others = others_share(candidates)
        if others:
            order = preference(request.prompt.chain, [each.endpoint.replica for each in candidates])
            for discount, at in zip(DISCOUNTS, order, strict=False):
                weights[at] *= 1.0 - discount * others
        shares = relative_weights([each.endpoint.weight for each in candidates])
        costs = [
            weight * max(0, tokens - each.cached_tokens)
            + each.pending_prefill_tokens / share
            + REQUEST_TOKENS * requests
            for weight, each, share, requests in zip(
                weights, candidates, shares, pending_requests(candidates), strict=True
            )
        ]
        least = min(costs)
        return [(1.0 + least) / (1.0 + cost) for cost in costs]


def uncached_weights(pressures: Sequence[float]) -> list[float]:
    """Returns what an uncached token costs at each candidate, dearer where caches turn over fast."""
    total = sum(pressures)
    if not total:
        return [UNCACHED_WEIGHT] * len(pressures)
    share = PRESSURE_WEIGHT * UNCACHED_WEIGHT * len(pressures) / total
    return [UNCACHED_WEIGHT + share * each for each in pressures]
