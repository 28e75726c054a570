"""Finds picking plug-ins and puts a strategy together from their names.

In comes the configured text (`least-pending`, or several names separated by commas), out comes a
`Strategy`, or an error that lists what there is: a wrong name stops the process at its start, not at
its first request. Plug-ins are entry points of the group `millrace.picking`; each is a class without
arguments that is a filter, a scorer or a picker.
"""

from collections.abc import Callable, Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from core.errors import InvalidArgument
from router.picking.contract import Filter, Picker, Scorer, Strategy
from router.picking.highest_score import HighestScore

GROUP = "millrace.picking"
OPTION = "strategy"

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
        text: Names of plug-ins, separated by commas.
        plugins: What is available; by default what is installed.

    Raises:
        InvalidArgument: A name is unknown or does not load, or there is more than one picker.
    """
    available = installed_plugins() if plugins is None else plugins
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise InvalidArgument.of(OPTION, f"names no strategy; known: {', '.join(sorted(available))}")
    filters: list[Filter] = []
    scorers: list[Scorer] = []
    pickers: list[Picker] = []
    for name in names:
        plugin = _build(name, available)
        # One class may play several roles.
        known = False
        if isinstance(plugin, Filter):
            filters.append(plugin)
            known = True
        if isinstance(plugin, Scorer):
            scorers.append(plugin)
            known = True
        if isinstance(plugin, Picker):
            pickers.append(plugin)
            known = True
        if not known:
            raise InvalidArgument.of(OPTION, f"`{name}` is neither a filter nor a scorer nor a picker")
    if len(pickers) > 1:
        raise InvalidArgument.of(
            OPTION, f"`{text}` holds {len(pickers)} pickers; exactly one has the last word"
        )
    return Strategy(
        name=",".join(names),
        filters=tuple(filters),
        scorers=tuple(scorers),
        picker=pickers[0] if pickers else HighestScore(),
    )


def _build(name: str, available: Plugins) -> Any:
    if name not in available:
        raise InvalidArgument.of(OPTION, f"`{name}` is not known; known: {', '.join(sorted(available))}")
    try:
        return available[name]()
    except Exception as error:
        # A plug-in is someone else's code: whatever it raises, the process must say which one it was.
        raise InvalidArgument.of(OPTION, f"`{name}` does not load: {error!r}") from error
