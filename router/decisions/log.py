"""The latest decisions of this worker, kept as references and worked out only when somebody asks.

In come the request, the endpoints at each stage of a choice and what the selector looked at; out comes, by
request id, a `Decision` to be rendered. Keeping one costs about a microsecond: nothing is copied or scored.
The ring is bounded by decisions and by the bytes that they keep alive; the oldest go first. No secret is in
it: of the body only its reference is kept, because plug-ins may have scored by it, and it is never shown.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
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


# Its constructor is written out because the one that `dataclass` makes stays interpreted where all else is
# compiled, and every request makes one.
@dataclass(init=False, slots=True)
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

    def __init__(
        self,
        context: RequestContext,
        strategy: Strategy,
        endpoints: Sequence[Endpoint],
        eligible: Sequence[Endpoint],
        free: Sequence[Endpoint],
        considered: Considered | None,
        chosen: Candidate | None,
        why: str,
        at_seconds: float,
    ) -> None:
        self.context = context
        self.strategy = strategy
        self.endpoints = endpoints
        self.eligible = eligible
        self.free = free
        self.considered = considered
        self.chosen = chosen
        self.why = why
        self.at_seconds = at_seconds


class Decision:
    """All choices for one request.

    Attributes:
        record: Its account.
        first: Its first choice.
        size_bytes: Memory that it keeps alive, estimated.
    """

    __slots__ = ("_further", "first", "record", "size_bytes")

    def __init__(self, record: RequestRecord, first: Step, size_bytes: int) -> None:
        self.record = record
        self.first = first
        self.size_bytes = size_bytes
        # Nearly all requests make one choice: they need no list.
        self._further: list[Step] | None = None

    @property
    def steps(self) -> list[Step]:
        """All choices, in the order of the attempts."""
        return [self.first] if self._further is None else [self.first, *self._further]

    def add(self, step: Step) -> None:
        """Adds a further choice."""
        if self._further is None:
            self._further = []
        self._further.append(step)


class DecisionLog:
    """Ring of the latest decisions."""

    def __init__(self, *, decisions_max: int = DECISIONS_MAX, bytes_max: int = BYTES_MAX) -> None:
        # A list of fixed length: entries are overwritten in turn.
        self._ring: list[Decision | None] = [None] * decisions_max
        self._decisions_max = decisions_max
        self._bytes_max = bytes_max
        self._bytes = 0
        # Where the next one goes, and how many before it are kept.
        self._next = 0
        self._kept = 0

    def __len__(self) -> int:
        return self._kept

    @property
    def size_bytes(self) -> int:
        """Memory that the ring keeps alive, estimated."""
        return self._bytes

    def open(self, record: RequestRecord, step: Step) -> Decision:
        """Keeps the first choice for a request."""
        context = step.context
        if len(context.body) > BODY_BYTES_MAX:
            context = _bare(step)
        size_bytes = (
            _BASE_BYTES
            + len(context.body)
            + _BLOCK_BYTES * len(context.prompt.chain)
            + _CANDIDATE_BYTES * len(step.endpoints)
        )
        decision = Decision(record, step, size_bytes)
        if self._kept == self._decisions_max:
            self._forget_oldest()
        at = self._next
        self._ring[at] = decision
        at += 1
        self._next = at if at < self._decisions_max else 0
        self._kept += 1
        self._bytes += size_bytes
        while self._bytes > self._bytes_max:
            self._forget_oldest()
        return decision

    def _forget_oldest(self) -> None:
        at = self._next - self._kept
        if at < 0:
            at += self._decisions_max
        oldest = self._ring[at]
        assert oldest is not None, "whatever is kept is there"
        self._bytes -= oldest.size_bytes
        self._kept -= 1
        self._ring[at] = None

    @staticmethod
    def add(decision: Decision, step: Step) -> None:
        """Keeps a further choice; its body is that of the first."""
        if len(step.context.body) > BODY_BYTES_MAX:
            _bare(step)
        decision.add(step)

    def find(self, request_id: str) -> Decision | None:
        """Returns the latest decision for a request id; None where it is not kept."""
        for back in range(1, self._kept + 1):
            # Before the beginning of a list is its end.
            decision = self._ring[self._next - back]
            if decision is not None and decision.record.request_id == request_id:
                return decision
        return None


def _bare(step: Step) -> RequestContext:
    """Takes the body out of what a step keeps."""
    step.context = replace(step.context, body=b"")
    return step.context
