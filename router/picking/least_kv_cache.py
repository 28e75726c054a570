"""Least KV cache: the engine with the most room for keys and values.

Formula, for each candidate, with k its KV usage from a sample not older than 5 s:

    penalty = 0.15 * k / (1 - k)
    score   = 1 / (1 + penalty)

which is nearly flat while there is room (k = 0.5: 0.87), and falls fast near full (0.9: 0.43; 0.99: 0.06).
A missing or stale value counts as the mean of the known ones. `full-cache-guard` is the hard bound.
"""

from collections.abc import Sequence

from router.picking.contract import Candidate, RequestContext
from router.picking.neutral import filled

_SCALE = 0.15
# At k = 0.999 a preemption is certain anyway; the bound keeps the penalty finite.
_USAGE_MAX = 0.999


class LeastKvCache:
    """Scorer that prefers room in the KV cache."""

    def score(self, request: RequestContext, candidates: Sequence[Candidate]) -> Sequence[float]:
        """Returns `1 / (1 + penalty)` for each candidate."""
        del request
        return [1.0 / (1.0 + penalty) for penalty in full_penalties(candidates)]


def full_penalties(candidates: Sequence[Candidate]) -> Sequence[float]:
    """Returns `0.15 k / (1 - k)` for each candidate."""
    usages = filled([None if each.sample is None else each.sample.kv_usage_ratio for each in candidates])
    bounded = [min(_USAGE_MAX, max(0.0, usage)) for usage in usages]
    return [_SCALE * usage / (1.0 - usage) for usage in bounded]
