"""The contract of picking plug-ins: filter -> score -> pick.

In come the request and the candidates, out comes exactly one of them, or none when a filter left none.
Plug-ins are called on the event loop for every request: they must not block, do I/O or keep state that
grows without a bound. What may be used at all (state, ejection, attempts) is decided before them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from router.view.samples import Sample
from router.view.view import Endpoint


@dataclass(frozen=True, slots=True)
class RequestContext:
    """What plug-ins may know of a request.

    Attributes:
        request_id: Identifies it in logs.
        route: Path of the OpenAI route.
        namespace: Tenant.
        deployment: Deployment that it goes to.
        model: As the client named it.
        stream: True when the client asked for a stream.
        body: As it came; plug-ins read and never change it.
    """

    request_id: str
    route: str
    namespace: str
    deployment: str
    model: str
    stream: bool
    body: bytes


@dataclass(frozen=True, slots=True)
class Candidate:
    """An endpoint that may be used for this request.

    Attributes:
        endpoint: Where it is.
        sample: Latest fresh sample of its engine; None is unknown.
        in_flight: Requests that this process has there now.
    """

    endpoint: Endpoint
    sample: Sample | None
    in_flight: int


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
class Strategy:
    """Filters, then scorers, then exactly one picker.

    Attributes:
        name: As configured.
        filters: Applied in order.
        scorers: Their scores are added.
        picker: Has the last word.
    """

    name: str
    filters: tuple[Filter, ...]
    scorers: tuple[Scorer, ...]
    picker: Picker

    def select(self, request: RequestContext, candidates: Sequence[Candidate]) -> Candidate | None:
        """Chooses a candidate; None when there is none or the filters left none."""
        for each in self.filters:
            candidates = each.keep(request, candidates)
        if not candidates:
            return None
        if len(candidates) == 1:
            scores = [0.0]
        else:
            scores = [0.0] * len(candidates)
            for scorer in self.scorers:
                scores = [
                    total + score
                    for total, score in zip(scores, scorer.score(request, candidates), strict=True)
                ]
        return self.picker.pick(request, candidates, scores)
