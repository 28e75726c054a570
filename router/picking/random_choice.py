"""Random: any endpoint with the same chance, blind to load.

Formula: one candidate drawn evenly. Scores are ignored. The source of chance is given, so that tests and
simulations repeat.
"""

from collections.abc import Sequence
from random import Random

from router.picking.contract import Candidate, RequestContext


class RandomChoice:
    """Picker that draws lots."""

    def __init__(self, generator: Random | None = None) -> None:
        # Spreading load needs no secrecy.
        self._generator = generator or Random()  # noqa: S311 - chance, not a secret

    def pick(
        self, request: RequestContext, candidates: Sequence[Candidate], scores: Sequence[float]
    ) -> Candidate:
        """Returns any candidate."""
        del request, scores
        return self._generator.choice(candidates)
