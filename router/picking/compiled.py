"""The default strategy in one function over columns: the choice of its plug-ins, without the plug-ins.

In come the columns of the endpoints and the counts of this moment, out comes the position of the chosen one.
Formulas and their reasons stand in `full_cache_guard`, `hot_spot_guard`, `least_cost` and `highest_score`,
which are what runs where weights differ or a plug-in of someone else takes part; a property test holds the
two to the same answer. It must not decide anything that they do not.
"""

from bisect import bisect_right
from collections.abc import Mapping, Sequence

from router.picking.columns import Columns
from router.picking.contract import Strategy
from router.picking.full_cache_guard import FullCacheGuard
from router.picking.highest_score import EQUAL, HighestScore
from router.picking.hot_spot_guard import FACTOR, HOT_ALIKE, HOT_FACTOR, HOT_SLACK, SLACK, HotSpotGuard
from router.picking.least_cost import DISCOUNTS, REQUEST_TOKENS, UNCACHED_WEIGHT, LeastCost, uncached_weights
from router.picking.neutral import filled
from router.picking.rotation import Rotation
from router.prefix.prompt import Prompt
from router.prefix.rendezvous import digests, prefix_key


def compile_strategy(strategy: Strategy) -> "CompiledDefault | None":
    """Returns the fast form of a strategy; None for any but the built-in default."""
    picker = strategy.picker
    if (
        [type(each) for each in strategy.filters] == [FullCacheGuard, HotSpotGuard]
        and [(type(each.scorer), each.weight) for each in strategy.scorers] == [(LeastCost, 1.0)]
        and type(picker) is HighestScore
    ):
        return CompiledDefault(picker.rotation)
    return None


class CompiledDefault:
    """The built-in default."""

    def __init__(self, rotation: Rotation) -> None:
        """Takes the turns of the picker that it stands for."""
        self._rotation = rotation

    def pick(
        self,
        prompt: Prompt,
        columns: Columns,
        in_flight: Sequence[int],
        pending: Sequence[int],
        cached: Sequence[int] | None,
        alike: Mapping[str, int] | None,
        pressures: Sequence[float] | None,
    ) -> int:
        """Returns the position of the chosen endpoint.

        Args:
            prompt: The request's.
            columns: Of at least one endpoint, all of the same weight; refreshed.
            in_flight: Own requests at each.
            pending: Own prompt tokens at each that are not computed yet.
            cached: Tokens of the prompt that each has cached; None where none has any.
            alike: Own requests whose prompts begin like this one, by replica; None for none.
            pressures: How fast the cache of each turns over; None for 0 everywhere.
        """
        kept = columns.roomy
        others = columns.filled_others
        if kept is not None or max(in_flight) > HOT_FACTOR * min(in_flight) + HOT_SLACK:
            kept = _without_hot_spots(columns, in_flight, alike or {})
        if kept is not None:
            if len(kept) == 1:
                return self._turn(columns, kept)
            in_flight = [in_flight[at] for at in kept]
            pending = [pending[at] for at in kept]
            others = filled([columns.others[at] for at in kept])
            cached = None if cached is None else [cached[at] for at in kept]
            pressures = None if pressures is None else [pressures[at] for at in kept]
        tokens = prompt.tokens
        if cached is None:
            uncached = [tokens] * len(pending)
        else:
            uncached = [tokens - each if tokens > each else 0 for each in cached]
        factors = _uncached_weights(columns, pressures, len(pending))
        if not columns.others_total:
            # The same formula; an addition of nothing changes no number.
            costs = [
                factor * computed + waiting + REQUEST_TOKENS * count
                for factor, computed, waiting, count in zip(
                    factors, uncached, pending, in_flight, strict=True
                )
            ]
        else:
            factors = list(factors)
            _discount(factors, prompt, columns, in_flight, kept)
            costs = [
                factor * computed + waiting + REQUEST_TOKENS * (count + other)
                for factor, computed, waiting, count, other in zip(
                    factors, uncached, pending, in_flight, others, strict=True
                )
            ]
        least = min(costs)
        # Exactly the candidates whose scores `HighestScore` takes for equal to the best one, which is 1.
        near = least + (1.0 + least) * 2.0 * EQUAL
        best = [at for at, cost in enumerate(costs) if cost <= near]
        if len(best) > 1:
            best = [at for at in best if (1.0 + least) / (1.0 + costs[at]) >= 1.0 - EQUAL]
        return self._turn(columns, best if kept is None else [kept[at] for at in best])

    def _turn(self, columns: Columns, positions: Sequence[int]) -> int:
        replicas = columns.replicas
        if len(positions) == 1:
            self._rotation.took(columns.deployment, replicas[positions[0]])
            return positions[0]
        if len(positions) == len(replicas) and columns.ordered:
            # Nothing tells them apart, as on idle engines: the next one in order.
            at = bisect_right(replicas, self._rotation.last(columns.deployment)) % len(replicas)
            self._rotation.took(columns.deployment, replicas[at])
            return at
        return replicas.index(
            self._rotation.next_replica(columns.deployment, [replicas[at] for at in positions])
        )


def _without_hot_spots(
    columns: Columns, own: Sequence[int], alike: Mapping[str, int]
) -> Sequence[int] | None:
    """Returns the positions that both guards keep; None for all."""
    roomy = columns.roomy
    positions = range(len(own)) if roomy is None else roomy
    least = min([own[at] for at in positions])
    hot, usual = HOT_FACTOR * least + HOT_SLACK, FACTOR * least + SLACK
    replicas = columns.replicas
    kept = [at for at in positions if own[at] <= (hot if alike.get(replicas[at], 0) >= HOT_ALIKE else usual)]
    return None if len(kept) == len(own) else kept


def _uncached_weights(columns: Columns, pressures: Sequence[float] | None, count: int) -> list[float]:
    """Returns what an uncached token costs at each; where nobody is left out, worked out once."""
    if pressures is None:
        return [UNCACHED_WEIGHT] * count
    if pressures is not columns.pressures:
        return uncached_weights(pressures)
    if columns.uncached_weights is None:
        columns.uncached_weights = uncached_weights(pressures)
    return columns.uncached_weights


def _discount(
    factors: list[float],
    prompt: Prompt,
    columns: Columns,
    in_flight: Sequence[int],
    kept: Sequence[int] | None,
) -> None:
    """Makes the first endpoints in the prompt's rendezvous order cheaper, as `LeastCost` does."""
    known = columns.others if kept is None else [columns.others[at] for at in kept]
    ours = theirs = 0
    for own_count, other in zip(in_flight, known, strict=True):
        if other is not None:
            ours += own_count
            theirs += other
    key = prefix_key(prompt.chain)
    if not theirs or key is None:
        return
    share = theirs / (ours + theirs)
    names = columns.names if kept is None else [columns.names[at] for at in kept]
    ranks = digests(key, names)
    for discount in DISCOUNTS[: len(ranks)]:
        first = ranks.index(max(ranks))
        factors[first] *= 1.0 - discount * share
        ranks[first] = -1
