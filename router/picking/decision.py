"""Why this engine: what a choice was made from, kept by reference and worked out only when someone asks.

In come the columns and counts of one choice, out come the candidates as plug-ins see them, and what each
filter and scorer of the strategy says to them. Filters and scorers run again on the very same values, so the
answer is what they said then; the picker is not asked again. It keeps no state and is never on the way of a
request.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from router.picking.columns import Columns
from router.picking.contract import CacheKnowledge, Candidate, RequestContext, Strategy
from router.view.samples import Sample


@dataclass(slots=True)
class Verdict:
    """What a strategy makes of one candidate.

    Attributes:
        candidate: As plug-ins saw it.
        dropped_by: Class of the filter that left it out; empty for none.
        scores: By the scorers' classes, unweighted; empty for one that was left out.
        total: Weighted sum of the scores.
        chosen: True for the one that got the request.
    """

    candidate: Candidate
    dropped_by: str = ""
    scores: dict[str, float] = field(default_factory=dict)
    total: float = 0.0
    chosen: bool = False


# Not frozen: every request makes one.
@dataclass(slots=True)
class Decision:
    """One choice, as it was made.

    Attributes:
        request: What was asked.
        columns: The endpoints.
        samples: Of each endpoint, as they were.
        in_flight: Own requests at each.
        pending: Own prompt tokens at each that were not computed yet.
        cached: Tokens that each had cached; None where none had any.
        alike: Own requests that begin alike, by replica, as they were; None for none.
        pressures: How fast the cache of each turns over; None for a prompt without a full block.
        knowledge: Where `cached` comes from, for each; None where all of it is approximate.
        chosen: Position of the one that got the request; None where filters left none.
    """

    request: RequestContext
    columns: Columns
    samples: Sequence[Sample | None]
    in_flight: Sequence[int]
    pending: Sequence[int]
    cached: Sequence[int] | None
    alike: Mapping[str, int] | None
    pressures: Sequence[float] | None
    knowledge: Sequence[CacheKnowledge] | None = None
    chosen: int | None = None

    def candidate(self, at: int) -> Candidate:
        """Returns one candidate as plug-ins see it."""
        endpoint = self.columns.endpoints[at]
        return Candidate(
            endpoint,
            self.samples[at],
            self.in_flight[at],
            0 if self.cached is None else self.cached[at],
            self.pending[at],
            0 if self.alike is None else self.alike.get(endpoint.replica, 0),
            CacheKnowledge.APPROXIMATE if self.knowledge is None else self.knowledge[at],
            0.0 if self.pressures is None else self.pressures[at],
        )

    def candidates(self) -> list[Candidate]:
        """Returns all candidates, in the endpoints' order."""
        return [self.candidate(at) for at in range(len(self.columns.endpoints))]

    def explain(self, strategy: Strategy) -> Sequence[Verdict]:
        """Returns what the strategy says to each candidate, in the endpoints' order."""
        verdicts = [
            Verdict(candidate, chosen=at == self.chosen) for at, candidate in enumerate(self.candidates())
        ]
        kept: Sequence[Verdict] = verdicts
        for each in strategy.filters:
            replicas = {
                candidate.endpoint.replica
                for candidate in each.keep(self.request, [verdict.candidate for verdict in kept])
            }
            for verdict in kept:
                if verdict.candidate.endpoint.replica not in replicas:
                    verdict.dropped_by = type(each).__name__
            kept = [verdict for verdict in kept if not verdict.dropped_by]
        if not kept:
            return verdicts
        for weighted in strategy.scorers:
            found = weighted.scorer.score(self.request, [verdict.candidate for verdict in kept])
            for verdict, score in zip(kept, found, strict=True):
                verdict.scores[type(weighted.scorer).__name__] = score
                verdict.total += weighted.weight * score
        return verdicts
