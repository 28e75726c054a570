"""Round robin: every endpoint in its turn, blind to load.

Formula: the candidate with the smallest replica id greater than the one chosen last for the deployment,
or the smallest of all. Scores are ignored. It keeps one replica id a deployment and nothing else.
"""

from collections.abc import Sequence

from router.picking.contract import Candidate, RequestContext
from router.picking.rotation import Rotation


class RoundRobin:
    """Picker that takes turns."""

    def __init__(self) -> None:
        self._rotation = Rotation()

    def pick(
        self, request: RequestContext, candidates: Sequence[Candidate], scores: Sequence[float]
    ) -> Candidate:
        """Returns the candidate whose turn it is."""
        del request, scores
        return self._rotation.next(candidates)
