"""Least load: the engine whose devices are least in use.

Formula, for each candidate:

    score = 1 - utilisation                        from a sample not older than 5 s

The utilisation is the mean of the replica's devices, which agents sample every 5 s. A missing or stale
value counts as the mean of the known ones, and as one half where none is known.
"""

from collections.abc import Sequence

from router.picking.contract import Candidate, RequestContext
from router.picking.neutral import filled

_UNKNOWN = 0.5


class LeastLoad:
    """Scorer that prefers idle devices."""

    def score(self, request: RequestContext, candidates: Sequence[Candidate]) -> Sequence[float]:
        """Returns `1 - utilisation` for each candidate."""
        del request
        used = filled(
            [None if each.sample is None else each.sample.device_utilization_ratio for each in candidates],
            otherwise=_UNKNOWN,
        )
        return [min(1.0, max(0.0, 1.0 - each)) for each in used]
