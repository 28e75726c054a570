"""Least pending: the endpoint with the fewest requests on it, ours and others'.

Formula, for each candidate:

    others  = max(0, running + waiting - own_peak)   from a sample not older than 5 s
    pending = (in_flight + others) / weight
    score   = 1 / (1 + pending)

The weight is relative to the others' (`picking.pending`). `in_flight` is what this process has there at this
moment, counted before it is sent. `own_peak` is the most it had there between the last two samples: the
engine's count holds our own requests too, and subtracting the peak never counts one of them twice. A
candidate whose sample is missing or stale gets the mean of the others' `others`, which makes it neither idle
nor saturated; without any sample the terms are zero for all and our own count decides. Equal scores take
turns (`HighestScore`).
"""

from collections.abc import Sequence

from router.picking.contract import Candidate, RequestContext
from router.picking.pending import pending_requests


class LeastPending:
    """Scorer that prefers idle endpoints."""

    def score(self, request: RequestContext, candidates: Sequence[Candidate]) -> Sequence[float]:
        """Returns `1 / (1 + pending)` for each candidate."""
        del request
        return [1.0 / (1.0 + pending) for pending in pending_requests(candidates)]
