"""One selector for each strategy in use: deployments may name their own.

In come deployments, out comes the selector that picks for them. Deployments with the same strategy share one,
and with it its prefix index and its turns; since an endpoint belongs to one deployment, no two selectors
count the same endpoint. A strategy that does not exist here is refused once, in the log, and the router's own
is used.
"""

from collections.abc import Callable, Iterable, Iterator

import structlog

from core.errors import InvalidArgument
from router.picking.contract import Strategy
from router.picking.registry import build_strategy
from router.picking.selector import Selector
from router.view.view import Deployment, View

_log = structlog.get_logger(__name__)

# Each has a prefix index of its own; more different strategies than this are no one's intention.
STRATEGIES_MAX = 16


class Selectors:
    """Selectors by strategy.

    Attributes:
        default: For deployments that name no strategy, or one that is refused.
    """

    def __init__(
        self,
        default: Selector,
        make: Callable[[Strategy], Selector],
        *,
        build: Callable[[str], Strategy] = build_strategy,
    ) -> None:
        """Takes how to make a selector for a strategy, and how to build a strategy from its text."""
        self.default = default
        self._make = make
        self._build = build
        self._by_text: dict[str, Selector] = {}
        self._refused: set[str] = set()

    def __iter__(self) -> Iterator[Selector]:
        yield self.default
        yield from self._by_text.values()

    def of(self, deployment: Deployment) -> Selector:
        """Returns the selector of a deployment."""
        text = deployment.routing.strategy
        return self._by_text.get(text, self.default) if text else self.default

    def view_changed(self, view: View) -> None:
        """Makes the selectors that the deployments of a view want, and forgets all others."""
        wanted = {each.routing.strategy for each in _deployments(view) if each.routing.strategy}
        self._refused &= wanted
        self._by_text = {text: each for text, each in self._by_text.items() if text in wanted}
        for text in sorted(wanted - self._by_text.keys() - self._refused):
            self._add(text)
        for each in self:
            each.retain(view.endpoints)

    def _add(self, text: str) -> None:
        try:
            if len(self._by_text) >= STRATEGIES_MAX:
                raise InvalidArgument.of("strategy", f"{STRATEGIES_MAX} others are in use already")
            self._by_text[text] = self._make(self._build(text))
        except InvalidArgument as error:
            self._refused.add(text)
            _log.error(
                "strategy of a deployment refused, the router's own is used",
                strategy=text,
                error=error.message,
            )


def _deployments(view: View) -> Iterable[Deployment]:
    return (each for tenant in view.tenants.values() for each in tenant.deployments.values())
