"""What an unknown value counts as: the mean of those that are known.

In come values of the candidates, some of them None; out come numbers in the same order. Unknown is neither
the best nor the worst, so that an engine whose statistics fail is neither flooded nor starved. Pure.
"""

from collections.abc import Sequence


def filled(values: Sequence[float | None], *, otherwise: float = 0.0) -> Sequence[float]:
    """Replaces None by the mean of the others, or by `otherwise` where all are None."""
    known = [each for each in values if each is not None]
    mean = sum(known) / len(known) if known else otherwise
    return [mean if each is None else each for each in values]
