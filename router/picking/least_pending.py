"""Least pending: the endpoint with the fewest requests on it, ours and others'.

Formula, for each candidate:

    others  = max(0, running + waiting - own_peak)   from a sample not older than 5 s
    pending = (in_flight + others) / weight
    score   = 1 / (1 + pending)

`in_flight` is what this process has there at this moment, counted before it is sent. `own_peak` is the
most it had there between the last two samples: the engine's count holds our own requests too, and
subtracting the peak never counts one of them twice. A candidate whose sample is missing or stale gets
the mean of the others' `others`, which makes it neither idle nor saturated; without any sample the
terms are zero for all and our own count decides. Equal scores take turns (`HighestScore`).
"""

from collections.abc import Sequence

from router.picking.contract import Candidate, RequestContext


class LeastPending:
    """Scorer that prefers idle endpoints."""

    def score(self, request: RequestContext, candidates: Sequence[Candidate]) -> Sequence[float]:
        """Returns `1 / (1 + pending)` for each candidate."""
        del request
        others = [None if each.sample is None else each.sample.others_in_flight for each in candidates]
        known = [each for each in others if each is not None]
        neutral = sum(known) / len(known) if known else 0.0
        return [
            1.0 / (1.0 + (each.in_flight + (neutral if other is None else other)) / each.endpoint.weight)
            for each, other in zip(candidates, others, strict=True)
        ]
