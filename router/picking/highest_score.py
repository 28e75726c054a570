"""The default picker: the best score wins, equals take turns.

Formula: among the candidates whose score is the maximum, the next one in rotation. Without scorers all
are equal and this is round robin.
"""

from collections.abc import Sequence

from router.picking.contract import Candidate, RequestContext
from router.picking.rotation import Rotation

# Sums of scores that differ by less differ by rounding.
EQUAL = 1e-9


class HighestScore:
    """Picker that takes the best."""

    def __init__(self) -> None:
        self.rotation = Rotation()

    def pick(
        self, request: RequestContext, candidates: Sequence[Candidate], scores: Sequence[float]
    ) -> Candidate:
        """Returns one of the candidates with the highest score."""
        del request
        best = max(scores)
        return self.rotation.next(
            [each for each, score in zip(candidates, scores, strict=True) if score >= best - EQUAL]
        )
