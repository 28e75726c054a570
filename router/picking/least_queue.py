"""Least queue: the engine with the fewest requests that wait inside it.

Formula, for each candidate:

    queue = waiting                                from a sample not older than 5 s
    score = (max - queue) / (max - min)            1 for all where max = min

A missing or stale value counts as the mean of the known ones. Samples are a second old: requests of our
own since then do not show, which is what `least-pending` is for.
"""

from collections.abc import Sequence

from router.picking.contract import Candidate, RequestContext
from router.picking.neutral import filled


class LeastQueue:
    """Scorer that prefers short queues inside engines."""

    def score(self, request: RequestContext, candidates: Sequence[Candidate]) -> Sequence[float]:
        """Returns 1 for the shortest queue, 0 for the longest."""
        del request
        queues = filled(
            [None if each.sample is None else each.sample.waiting_requests for each in candidates]
        )
        least, most = min(queues), max(queues)
        if least == most:
            return [1.0] * len(candidates)
        return [(most - queue) / (most - least) for queue in queues]
