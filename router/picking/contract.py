"""The contract of picking plug-ins: filter -> score -> pick.

In come the request and the candidates, out comes exactly one of them, or none when a filter left none.
Plug-ins are called on the event loop for every request: they must not block, do I/O or keep state that
grows without a bound. What may be used at all (state, ejection, attempts) is decided before them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple, Protocol, runtime_checkable

from router.picking.request import RequestContext
from router.view.samples import Sample
from router.view.view import Endpoint

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


class CacheKnowledge(Enum):
    """Where `Candidate.cached_tokens` comes from."""

    APPROXIMATE = "approximate"
    EXACT = "exact"


class Candidate(NamedTuple):
    """An endpoint that may be used for this request.

    Attributes:
        endpoint: Where it is.
        sample: Latest fresh sample of its engine; None is unknown.
        in_flight: Requests that this process has there now.
        cached_tokens: Leading tokens of this prompt that the engine has probably cached.
        pending_prefill_tokens: Uncached prompt tokens that this process has sent there and that have not
            brought a first byte yet.
        alike_in_flight: Those of `in_flight` whose prompts begin like this one (`prefix_key`).
        cache_knowledge: Whether `cached_tokens` is what this process has sent there, or what the engine
            itself says.
        cache_pressure: How fast its cache turns over, in caches for each request that any endpoint gets; 0
            where nothing was sent there. Only its ratio to others' means something.
    """

    endpoint: Endpoint
    sample: Sample | None
    in_flight: int
    cached_tokens: int = 0
    pending_prefill_tokens: int = 0
    alike_in_flight: int = 0
    cache_knowledge: CacheKnowledge = CacheKnowledge.APPROXIMATE
    cache_pressure: float = 0.0


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
