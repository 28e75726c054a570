"""A request that has been admitted and understood, on its way through the router.

In come its parts from whatever reads requests, out goes the body that an engine is sent. The director and
those who choose for it change it; it decides nothing.
"""

from dataclasses import dataclass, field

from router.decisions.log import Decision
from router.downstream import Downstream
from router.openai.body import ParsedBody, rename_model
from router.picking.contract import RequestContext
from router.picking.selector import Selector
from router.record import RequestRecord
from router.view.view import Endpoint
from router.wire.headers import RequestHeaders


@dataclass(slots=True)
class Call:
    """A request that has been admitted and understood.

    Attributes:
        path: Route with its query, for the engine.
        headers: The client's.
        downstream: The client's side.
        record: Its account.
        context: What plug-ins may know.
        parsed: What the body says.
        tried: Identities of the endpoints that failed it.
        attempts: How many that were.
        deadline_seconds: End of the wait for a fresh endpoint; None before it began.
        diverted: True once a fall-back serves it.
        selector: By which its endpoint was chosen; None before the first choice.
        decision: What was chosen so far; None before the first choice.
    """

    path: str
    headers: RequestHeaders
    downstream: Downstream
    record: RequestRecord
    context: RequestContext
    parsed: ParsedBody
    tried: set[tuple[str, str]] = field(default_factory=set)
    attempts: int = 0
    deadline_seconds: float | None = None
    diverted: bool = False
    selector: Selector | None = None
    decision: Decision | None = None
    _renamed: dict[str, bytes] = field(default_factory=dict)

    def body_for(self, endpoint: Endpoint) -> bytes:
        """Returns the body with the model name that an engine knows; the very bytes where it does."""
        name = endpoint.served_model_name
        if not name or name == self.parsed.model:
            return self.context.body
        if name not in self._renamed:
            self._renamed[name] = rename_model(self.context.body, name)
        return self._renamed[name]
