"""The latest decisions of this worker, kept as references and worked out only when somebody asks.

In come the request, the endpoints at each stage of a choice and what the selector looked at; out comes, by
request id, a `Decision` to be rendered. Keeping one costs about a microsecond: nothing is copied or scored.
The ring is bounded by decisions and by the bytes that they keep alive; the oldest go first. No secret is in
it: of the body only its reference is kept, because plug-ins may have scored by it, and it is never shown.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from router.picking.contract import Candidate, RequestContext, Strategy
from router.record import RequestRecord
from router.view.view import Endpoint

DECISIONS_MAX = 1024
# Larger bodies are not kept: a few of them would displace all other decisions.
BODY_BYTES_MAX = 256 * 1024
BYTES_MAX = 16 * 1024 * 1024
# Of a decision without its body: record, context, and some hundred bytes a candidate.
_BASE_BYTES = 2048
_CANDIDATE_BYTES = 256
_BLOCK_BYTES = 40


class Considered(Protocol):
    """What a selector looked at in one choice."""

    def candidates(self) -> Sequence[Candidate]:
        """Returns the candidates as they were."""
        ...


@dataclass(slots=True)
class Step:
    """One choice.

    Attributes:
        context: What the plug-ins were told.
        strategy: What they are.
        endpoints: Of the deployment.
        eligible: Those whose state, breaker and earlier attempts allow it.
        free: Those of them with room.
        considered: What the selector saw of the last ones; None where it saw nothing.
        chosen: Who got it; None where nobody did.
        why: The token of `x-millrace-reason`.
        at_seconds: When, on the monotonic clock.
    """

    context: RequestContext
    strategy: Strategy
    endpoints: Sequence[Endpoint]
    eligible: Sequence[Endpoint]
    free: Sequence[Endpoint]
    considered: Considered | None
    chosen: Candidate | None
    why: str
    at_seconds: float


@dataclass(slots=True)
class Decision:
    """All choices for one request.

    Attributes:
        record: Its account.
        steps: In the order of the attempts.
        size_bytes: Memory that it keeps alive, estimated.
    """

    record: RequestRecord
    steps: list[Step] = field(default_factory=list)
    size_bytes: int = 0


class DecisionLog:
    """Ring of the latest decisions."""

    def __init__(self, *, decisions_max: int = DECISIONS_MAX, bytes_max: int = BYTES_MAX) -> None:
        self._ring: deque[Decision] = deque()
        self._decisions_max = decisions_max
        self._bytes_max = bytes_max
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._ring)

    @property
    def size_bytes(self) -> int:
        """Memory that the ring keeps alive, estimated."""
        return self._bytes

    def open(self, record: RequestRecord, step: Step) -> Decision:
        """Keeps the first choice for a request."""
        context = _kept(step).context
        decision = Decision(
            record,
            [step],
            _BASE_BYTES
            + len(context.body)
            + _BLOCK_BYTES * len(context.prompt.chain)
            + _CANDIDATE_BYTES * len(step.endpoints),
        )
        self._ring.append(decision)
        self._bytes += decision.size_bytes
        while len(self._ring) > self._decisions_max or self._bytes > self._bytes_max:
            self._bytes -= self._ring.popleft().size_bytes
        return decision

    @staticmethod
    def add(decision: Decision, step: Step) -> None:
        """Keeps a further choice; its body is that of the first."""
        decision.steps.append(_kept(step))

    def find(self, request_id: str) -> Decision | None:
        """Returns the latest decision for a request id; None where it is not kept."""
        return next((each for each in reversed(self._ring) if each.record.request_id == request_id), None)


def _kept(step: Step) -> Step:
    if len(step.context.body) > BODY_BYTES_MAX:
        step.context = replace(step.context, body=b"")
    return step
