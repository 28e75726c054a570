"""What a choice was made from, kept by reference and made into candidates only when someone asks.

In come the columns and counts of one choice, out come the candidates as plug-ins see them, as they were then.
What filters and scorers say to them is worked out by `router.decisions.render`. The request is not kept here:
a thousand decisions would keep a thousand bodies alive.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from router.picking.candidate import APPROXIMATE, CacheKnowledge, Candidate
from router.picking.columns import Columns
from router.view.samples import Sample


# Not frozen: every request makes one. Why `__init__` is written out stands in `picking.candidate`.
@dataclass(init=False, slots=True)
class Decision:
    """One choice, as it was made.

    Attributes:
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

    columns: Columns
    samples: Sequence[Sample | None]
    in_flight: list[int]
    pending: list[int]
    cached: list[int] | None
    alike: dict[str, int] | None
    pressures: list[float] | None
    knowledge: list[CacheKnowledge] | None
    chosen: int | None

    def __init__(
        self,
        columns: Columns,
        samples: Sequence[Sample | None],
        in_flight: list[int],
        pending: list[int],
        cached: list[int] | None,
        alike: dict[str, int] | None,
        pressures: list[float] | None,
        knowledge: list[CacheKnowledge] | None = None,
        chosen: int | None = None,
    ) -> None:
        self.columns = columns
        self.samples = samples
        self.in_flight = in_flight
        self.pending = pending
        self.cached = cached
        self.alike = alike
        self.pressures = pressures
        self.knowledge = knowledge
        self.chosen = chosen

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
            APPROXIMATE if self.knowledge is None else self.knowledge[at],
            0.0 if self.pressures is None else self.pressures[at],
        )

    def candidates(self) -> list[Candidate]:
        """Returns all candidates, in the endpoints' order."""
        return [self.candidate(at) for at in range(len(self.columns.endpoints))]
