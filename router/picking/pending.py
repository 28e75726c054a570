"""How many requests are at each candidate: ours at this moment, and others' as far as samples tell.

Formula: (in_flight + others) / weight, where `others` is what `Sample.others_in_flight` says, and the mean
of the known ones where a sample is missing or stale, and `weight` is the candidate's weight over the mean of
all candidates' weights: weights say how endpoints compare, so that 100 each is the same as 1 each. Pure.
"""

from collections.abc import Sequence

from router.picking.contract import Candidate
from router.picking.neutral import filled


def pending_requests(candidates: Sequence[Candidate]) -> Sequence[float]:
    """Returns the pending requests for each candidate, in the same order."""
    others = filled([None if each.sample is None else each.sample.others_in_flight for each in candidates])
    weights = relative_weights([each.endpoint.weight for each in candidates])
    return [
        (each.in_flight + other) / weight
        for each, other, weight in zip(candidates, others, weights, strict=True)
    ]


def relative_weights(weights: Sequence[int]) -> Sequence[float]:
    """Returns weights over their mean; there is at least one."""
    mean = sum(weights) / len(weights)
    return [each / mean for each in weights]


def others_share(candidates: Sequence[Candidate]) -> float:
    """Returns the share of the requests at all candidates that others sent, 0 to 1.

    Formula: others / (ours + others), over the candidates with a fresh sample; 0 where nothing is known.
    """
    ours = others = 0
    for each in candidates:
        known = None if each.sample is None else each.sample.others_in_flight
        if known is not None:
            ours += each.in_flight
            others += known
    return others / (ours + others) if others else 0.0
