"""Hot-spot guard: no affinity may pile requests on one endpoint, or leave another idle.

Formula: with r the requests that this process has at a candidate, over its weight relative to the others'
(`pending`), and `alike` those of them whose prompts begin like this one, a candidate stays when

    r <= 2 * min(r) + 2        where alike >= 3: the prompt's prefix is hot, so it is worth caching twice
    r <= 4 * min(r) + 16       otherwise: an own prefix is worth a queue, but not any queue

The least busy always stays. The bounds hang on the least busy and not on the mean, because an idle endpoint
hardly lowers the mean: a prefix that all share would stay on the engines that have it, for ever. The tight
bound for all prompts would cost a tenth of the hit rate on the conversation trace. Only our own requests
count: they are known at this moment, and every router evens out its own.
"""

from collections.abc import Sequence

from router.picking.contract import Candidate, RequestContext
from router.picking.pending import relative_weights

HOT_ALIKE = 3
HOT_FACTOR, HOT_SLACK = 2.0, 2.0
FACTOR, SLACK = 4.0, 16.0


class HotSpotGuard:
    """Filter that never empties the list."""

    def keep(self, request: RequestContext, candidates: Sequence[Candidate]) -> Sequence[Candidate]:
        """Returns the candidates that are not far busier than the least busy."""
        del request
        if len(candidates) < 2:
            return candidates
        weights = relative_weights([each.endpoint.weight for each in candidates])
        own = [each.in_flight / weight for each, weight in zip(candidates, weights, strict=True)]
        least = min(own)
        hot, usual = HOT_FACTOR * least + HOT_SLACK, FACTOR * least + SLACK
        return [
            each
            for each, requests in zip(candidates, own, strict=True)
            if requests <= (hot if each.alike_in_flight >= HOT_ALIKE else usual)
        ]
