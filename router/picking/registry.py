"""Finds picking plug-ins and puts a strategy together from their names.

In comes the configured text (`least-pending`, or several names separated by commas), out comes a
`Strategy`, or an error that lists what there is: a wrong name stops the process at its start, not at
its first request. Plug-ins are entry points of the group `millrace.picking`; each is a class without
arguments that is a filter, a scorer or a picker. Two class attributes are read: `reads_prompt = True` has
prompts hashed, and `affine = True` (it may prefer one endpoint however busy it is) brings the hot-spot guard.
"""

import math
from collections.abc import Callable, Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from core.errors import InvalidArgument
from router.picking.contract import Filter, Picker, Scorer, Strategy, WeightedScorer
from router.picking.highest_score import HighestScore
from router.picking.hot_spot_guard import HotSpotGuard

GROUP = "millrace.picking"
OPTION = "strategy"

# Strategies with a name of their own, put together from plug-ins.
BUNDLES = {"default": "full-cache-guard,hot-spot-guard,least-cost"}
# Short names for weights: `prefix=3,kv=2,load=2`.
ALIASES = {"prefix": "prefix-aware", "kv": "least-kv-cache", "load": "least-pending"}

Plugins = Mapping[str, Callable[[], Any]]


def installed_plugins() -> dict[str, Callable[[], Any]]:
    """Returns the plug-ins of this environment by name, each loaded only when it is built."""

    def builder(entry: EntryPoint) -> Callable[[], Any]:
        def build() -> Any:
            plugin = entry.load()
            return plugin()

        return build

    return {entry.name: builder(entry) for entry in entry_points(group=GROUP)}


def build_strategy(text: str, plugins: Plugins | None = None) -> Strategy:
    """Builds a strategy.

    Args:
        text: Names of plug-ins, separated by commas; a scorer's may have a weight, as in
            `prefix=3,kv=2,load=2`.
        plugins: What is available; by default what is installed.

    Raises:
        InvalidArgument: A name is unknown or does not load, a weight is none, or there is more than one
            picker.
    """
    available = installed_plugins() if plugins is None else plugins
    parts = [part.strip() for part in BUNDLES.get(text.strip(), text).split(",") if part.strip()]
    if not parts:
        raise InvalidArgument.of(OPTION, f"names no strategy; known: {_known(available)}")
    filters: list[Filter] = []
    scorers: list[WeightedScorer] = []
    pickers: list[Picker] = []
    reads_prompt = affine = False
    for part in parts:
        name, weight = _weighted(part)
        plugin = _build(ALIASES.get(name, name), available)
        # One class may play several roles.
        if isinstance(plugin, Filter):
            filters.append(plugin)
        if isinstance(plugin, Scorer):
            scorers.append(WeightedScorer(plugin, 1.0 if weight is None else weight))
        elif weight is not None:
            raise InvalidArgument.of(OPTION, f"`{name}` is no scorer, so it takes no weight")
        if isinstance(plugin, Picker):
            pickers.append(plugin)
        if not isinstance(plugin, Filter | Scorer | Picker):
            raise InvalidArgument.of(OPTION, f"`{name}` is neither a filter nor a scorer nor a picker")
        reads_prompt = reads_prompt or bool(getattr(plugin, "reads_prompt", False))
        affine = affine or bool(getattr(plugin, "affine", False))
    if len(pickers) > 1:
        raise InvalidArgument.of(
            OPTION, f"`{text}` holds {len(pickers)} pickers; exactly one has the last word"
        )
    if affine and not any(isinstance(each, HotSpotGuard) for each in filters):
        filters.append(HotSpotGuard())
    return Strategy(
        name=text.strip(),
        filters=tuple(filters),
        scorers=tuple(scorers),
        picker=pickers[0] if pickers else HighestScore(),
        reads_prompt=reads_prompt,
    )


def _weighted(part: str) -> tuple[str, float | None]:
    name, separator, text = part.partition("=")
    if not separator:
        return name, None
    try:
        weight = float(text)
    except ValueError:
        weight = math.nan
    if not 0 < weight < math.inf:
        raise InvalidArgument.of(OPTION, f"`{part}`: a weight is a number greater than 0")
    return name.strip(), weight


def _known(available: Plugins) -> str:
    return ", ".join(sorted({*available, *(BUNDLES if "least-cost" in available else ())}))


def _build(name: str, available: Plugins) -> Any:
    if name not in available:
        raise InvalidArgument.of(OPTION, f"`{name}` is not known; known: {_known(available)}")
    try:
        return available[name]()
    except Exception as error:
        # A plug-in is someone else's code: whatever it raises, the process must say which one it was.
        raise InvalidArgument.of(OPTION, f"`{name}` does not load: {error!r}") from error
