"""Weighted by compute: every endpoint gets its share of the weights, evenly interleaved.

Formula (smooth weighted round robin): each candidate's credit grows by its weight; the greatest credit is
picked and pays the sum of the weights. Weights 5, 1, 1 give a a b a c a a, not a a a a a b c. Scores are
ignored. `Endpoint.weight` is the compute of a replica relative to its siblings.
"""

from collections import OrderedDict
from collections.abc import Sequence

from router.picking.contract import Candidate, RequestContext

# As many as `Rotation` remembers, for its reason.
_DEPLOYMENTS_MAX = 10_000


class Weighted:
    """Picker that takes turns in proportion to weights."""

    def __init__(self) -> None:
        self._credits: OrderedDict[tuple[str, str], dict[str, int]] = OrderedDict()

    def pick(
        self, request: RequestContext, candidates: Sequence[Candidate], scores: Sequence[float]
    ) -> Candidate:
        """Returns the candidate with the greatest credit."""
        del request, scores
        first = candidates[0].endpoint
        key = (first.namespace, first.deployment)
        before = self._credits.get(key, {})
        # Endpoints that are not among the candidates now lose their credit, which bounds the table.
        credit = {
            each.endpoint.replica: before.get(each.endpoint.replica, 0) + each.endpoint.weight
            for each in candidates
        }
        chosen = max(candidates, key=lambda each: (credit[each.endpoint.replica], each.endpoint.replica))
        credit[chosen.endpoint.replica] -= sum(each.endpoint.weight for each in candidates)
        self._credits[key] = credit
        self._credits.move_to_end(key)
        if len(self._credits) > _DEPLOYMENTS_MAX:
            self._credits.popitem(last=False)
        return chosen
