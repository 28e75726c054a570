"""A request that has been admitted and understood, on its way through the router.

In come its parts from whatever reads requests. The director and those who choose for it change it; it decides
nothing.
"""

from router.decisions.log import Decision
from router.delivery import Delivery
from router.downstream import Downstream
from router.openai.body import ParsedBody
from router.picking.contract import RequestContext
from router.picking.selector import Selector
from router.record import RequestRecord
from router.wire.headers import RequestHeaders


class Call:
    """A request that has been admitted and understood.

    Attributes:
        path: Route with its query, for the engine.
        headers: The client's.
        downstream: The client's side.
        record: Its account.
        context: What plug-ins may know.
        parsed: What the body says.
        delivery: Makes what engines are sent and brings the answer to the client.
        pinned: Replica that alone can serve it; empty for any.
        method: For the engine.
        tried: Identities of the endpoints that failed it.
        attempts: How many that were.
        deadline_seconds: End of the wait for a fresh endpoint; None before it began.
        diverted: True once a fall-back serves it.
        selector: By which its endpoint was chosen; None before the first choice.
        decision: What was chosen so far; None before the first choice.
    """

    __slots__ = (
        "attempts", "context", "deadline_seconds", "decision", "delivery", "diverted", "downstream",
        "headers", "method", "parsed", "path", "pinned", "record", "selector", "tried",
    )  # fmt: skip

    def __init__(
        self,
        *,
        path: str,
        headers: RequestHeaders,
        downstream: Downstream,
        record: RequestRecord,
        context: RequestContext,
        parsed: ParsedBody,
        delivery: Delivery,
        pinned: str,
        method: str,
    ) -> None:
        self.path = path
        self.headers = headers
        self.downstream = downstream
        self.record = record
        self.context = context
        self.parsed = parsed
        self.delivery = delivery
        self.pinned = pinned
        self.method = method
        self.tried: set[tuple[str, str]] = set()
        self.attempts = 0
        self.deadline_seconds: float | None = None
        self.diverted = False
        self.selector: Selector | None = None
        self.decision: Decision | None = None
