"""The default strategy in one function over columns: the choice of its plug-ins, without the plug-ins.

In come the columns of the endpoints and the counts of this moment, out comes the position of the chosen one.
Formulas and their reasons stand in `full_cache_guard`, `hot_spot_guard`, `least_cost` and `highest_score`,
which are what runs where weights differ or a plug-in of someone else takes part; a property test holds the
two to the same answer. It must not decide anything that they do not.
"""

import math
from bisect import bisect_right

from router.picking.columns import Columns
from router.picking.contract import Strategy
from router.picking.full_cache_guard import FullCacheGuard
from router.picking.highest_score import EQUAL, HighestScore
from router.picking.hot_spot_guard import FACTOR, HOT_ALIKE, HOT_FACTOR, HOT_SLACK, SLACK, HotSpotGuard
from router.picking.least_cost import DISCOUNTS, REQUEST_TOKENS, UNCACHED_WEIGHT, LeastCost, uncached_weights
from router.picking.neutral import filled
from router.picking.rotation import Rotation
from router.prefix.chain import Digest
from router.prefix.prompt import Prompt
from router.prefix.rendezvous import digests


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
        in_flight: list[int],
        pending: list[int],
        cached: list[int] | None,
        alike: dict[str, int] | None,
        pressures: list[float] | None,
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
        if kept is not None or _uneven(in_flight):
            kept = _without_hot_spots(columns, in_flight, alike or {})
        if kept is not None:
            if len(kept) == 1:
                return self._turn(columns, kept)
            in_flight = [in_flight[at] for at in kept]
            pending = [pending[at] for at in kept]
            others = [float(each) for each in filled([columns.others[at] for at in kept])]
            cached = None if cached is None else [cached[at] for at in kept]
            pressures = None if pressures is None else [pressures[at] for at in kept]
        factors = _uncached_weights(columns, pressures, len(pending))
        if columns.others_total:
            factors = factors.copy()
            _discount(factors, prompt, columns, in_flight, kept)
        tokens = prompt.tokens
        costs: list[float] = []
        least = math.inf
        for at in range(len(in_flight)):
            computed = tokens
            if cached is not None:
                computed = tokens - cached[at]
                computed = max(computed, 0)
            cost = factors[at] * computed + pending[at] + REQUEST_TOKENS * (in_flight[at] + others[at])
            costs.append(cost)
            least = min(least, cost)
        # Exactly the candidates whose scores `HighestScore` takes for equal to the best one, which is 1.
        near = least + (1.0 + least) * 2.0 * EQUAL
        best: list[int] = []
        for at in range(len(costs)):
            cost = costs[at]
            if cost <= near and (1.0 + least) / (1.0 + cost) >= 1.0 - EQUAL:
                best.append(at if kept is None else kept[at])
        return self._turn(columns, best)

    def _turn(self, columns: Columns, positions: list[int]) -> int:
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


def _uneven(own: list[int]) -> bool:
    """Tells whether the hot-spot guard could leave out anyone."""
    least = most = own[0]
    for each in own:
        if each < least:
            least = each
        elif each > most:
            most = each
    return most > HOT_FACTOR * least + HOT_SLACK


def _without_hot_spots(columns: Columns, own: list[int], alike: dict[str, int]) -> list[int] | None:
    """Returns the positions that both guards keep; None for all."""
    roomy = columns.roomy
    positions = columns.positions if roomy is None else roomy
    least = min([own[at] for at in positions])
    hot, usual = HOT_FACTOR * least + HOT_SLACK, FACTOR * least + SLACK
    replicas = columns.replicas
    kept = [at for at in positions if own[at] <= (hot if alike.get(replicas[at], 0) >= HOT_ALIKE else usual)]
    return None if len(kept) == len(own) else kept


def _uncached_weights(columns: Columns, pressures: list[float] | None, count: int) -> list[float]:
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
    in_flight: list[int],
    kept: list[int] | None,
) -> None:
    """Makes the first endpoints in the prompt's rendezvous order cheaper, as `LeastCost` does."""
    known = columns.others if kept is None else [columns.others[at] for at in kept]
    ours = theirs = 0
    for at in range(len(known)):
        other = known[at]
        if other is not None:
            ours += in_flight[at]
            theirs += other
    key = prompt.key
    if not theirs or key is None:
        return
    share = theirs / (ours + theirs)
    names = columns.names if kept is None else [columns.names[at] for at in kept]
    # The first two in one look, as `preference` would sort them.
    first = second = -1
    best: Digest = -1
    runner_up: Digest = -1
    for at, rank in enumerate(digests(key, names)):
        if rank > best:
            second, runner_up, first, best = first, best, at, rank
        elif rank > runner_up:
            second, runner_up = at, rank
    factors[first] *= 1.0 - DISCOUNTS[0] * share
    if second >= 0:
        factors[second] *= 1.0 - DISCOUNTS[1] * share
