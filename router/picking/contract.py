"""The contract of picking plug-ins: filter -> score -> pick.

In come the request and the candidates, out comes exactly one of them, or none when a filter left none.
Plug-ins are called on the event loop for every request: they must not block, do I/O or keep state that
grows without a bound. What may be used at all (state, ejection, attempts) is decided before them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from router.picking.candidate import CacheKnowledge, Candidate
from router.picking.request import RequestContext

__all__ = [
    "CacheKnowledge",
    "Candidate",
    "Filter",
    "Picker",
    "RequestContext",
    "Scorer",
    "Strategy",
    "WeightedScorer",
]


@runtime_checkable
class Filter(Protocol):
    """Leaves out candidates that do not suit the request."""

    def keep(self, request: RequestContext, candidates: Sequence[Candidate]) -> Sequence[Candidate]:
        """Returns those that stay, in the same order."""
        ...


@runtime_checkable
class Scorer(Protocol):
    """Rates candidates."""

    def score(self, request: RequestContext, candidates: Sequence[Candidate]) -> Sequence[float]:
        """Returns a score from 0 (worst) to 1 (best) for each candidate, in the same order."""
        ...


@runtime_checkable
class Picker(Protocol):
    """Chooses one of the scored candidates."""

    def pick(
        self, request: RequestContext, candidates: Sequence[Candidate], scores: Sequence[float]
    ) -> Candidate:
        """Returns one of the candidates, of which there is at least one."""
        ...


@dataclass(frozen=True, slots=True)
class WeightedScorer:
    """A scorer and how much it counts."""

    scorer: Scorer
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Strategy:
    """Filters, then scorers, then exactly one picker.

    Attributes:
        name: As configured.
        filters: Applied in order.
        scorers: Their scores are added, each times its weight.
        picker: Has the last word.
        reads_prompt: True when one of the plug-ins says `reads_prompt = True`; without it no prompt is
            hashed and `cached_tokens` is 0.
    """

    name: str
    filters: tuple[Filter, ...]
    scorers: tuple[WeightedScorer, ...]
    picker: Picker
    reads_prompt: bool = False

    def select(self, request: RequestContext, candidates: Sequence[Candidate]) -> Candidate | None:
        """Chooses a candidate; None when there is none or the filters left none."""
        for each in self.filters:
            candidates = each.keep(request, candidates)
        if not candidates:
            return None
        scores = [0.0] * len(candidates)
        if len(candidates) > 1:
            for weighted in self.scorers:
                found = weighted.scorer.score(request, candidates)
                scores = [total + weighted.weight * score for total, score in zip(scores, found, strict=True)]
        return self.picker.pick(request, candidates, scores)
