"""One deployment as this worker sees its requests: who waits, how many there are, how fast they end.

The gate and the director change it; `demand` tells the cluster. Plain data and sums, nothing waits here.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from millrace.state.v1 import records_pb2

from core.clock import Clock
from router.admission.drain_rate import DrainRate
from router.admission.first_token import FirstTokenTimes
from router.admission.line import WaitingLine
from router.admission.waiter import Waiter

# Demand of a deployment is told for this long after its last request.
DEMAND_SECONDS = 60.0
# A model that has not come up by then is not helped by clients that wait longer between tries.
START_RETRY_SECONDS_MAX = 120
# Share of the usual start after which one that is overdue is asked for again.
_OVERDUE_RATIO = 0.1


@dataclass(slots=True)
class Lane:
    """Requests for one deployment in this worker.

    Attributes:
        namespace: Tenant.
        deployment: Name.
        line: Who waits, for a free engine or for any engine.
        granted: Waiters that were told to go and have not been sent yet; their places are taken.
        in_flight: Requests between their choice of an engine and their end.
        requests_total: Requests that came.
        ended_total: Requests that were sent to an engine and have ended.
        diverted: Requests that went to the fall-back because there was no endpoint, since demand was told.
        last_request_seconds: When the last one came, on the monotonic clock.
        absent_seconds: When a request first found no endpoint; None where there is one.
        start_seconds: How long requests here waited for the first endpoint, last time; None before.
        drain: How fast the line moves.
        first_tokens: Of streams.
    """

    namespace: str
    deployment: str
    line: WaitingLine[Waiter] = field(default_factory=lambda: WaitingLine(0))
    granted: int = 0
    in_flight: int = 0
    requests_total: int = 0
    ended_total: int = 0
    diverted: int = 0
    last_request_seconds: float = -math.inf
    absent_seconds: float | None = None
    start_seconds: float | None = None
    drain: DrainRate = field(default_factory=DrainRate)
    first_tokens: FirstTokenTimes = field(default_factory=FirstTokenTimes)

    @property
    def busy(self) -> bool:
        """True while someone waits or is about to be sent: whoever comes now has to join the line."""
        return self.granted > 0 or len(self.line) > 0

    @property
    def unused(self) -> bool:
        """True where nothing would be lost with it."""
        return not self.busy and not self.in_flight

    def count_in(self, now_seconds: float) -> None:
        """Counts a request that has come, on the monotonic clock."""
        self.requests_total += 1
        self.last_request_seconds = now_seconds

    def present(self, now_seconds: float) -> None:
        """Notes that there is an endpoint."""
        if self.absent_seconds is not None:
            self.start_seconds = now_seconds - self.absent_seconds
            self.absent_seconds = None

    def start_retry_seconds(
        self, now_seconds: float, *, measured_seconds: float | None, default_seconds: float
    ) -> int:
        """Returns when the deployment probably has an endpoint, in whole seconds from now, within bounds.

        Args:
            now_seconds: On the monotonic clock.
            measured_seconds: How long the last start took, as the cluster measured it: whole, while this
                worker may have come in the middle of one. None where it is not known.
            default_seconds: How long a start takes where none was seen yet.
        """
        seen = self.start_seconds if measured_seconds is None else measured_seconds
        usual = default_seconds if seen is None else seen
        waited = 0.0 if self.absent_seconds is None else now_seconds - self.absent_seconds
        left = max(usual - waited, usual * _OVERDUE_RATIO)
        return max(1, min(START_RETRY_SECONDS_MAX, math.ceil(left)))


def demand(lanes: Sequence[Lane], clock: Clock) -> list[records_pb2.DeploymentDemand]:
    """Returns what the cluster should know of the lanes, in the order of their names; idle ones are left out.

    Requests that were diverted count as parked: they, too, want the deployment woken up.
    """
    now, wall = clock.monotonic(), clock.now().timestamp()
    found = []
    for lane in sorted(lanes, key=lambda each: (each.namespace, each.deployment)):
        if lane.unused and now - lane.last_request_seconds > DEMAND_SECONDS:
            continue
        absent = lane.absent_seconds is not None
        entry = records_pb2.DeploymentDemand(
            namespace=lane.namespace,
            deployment=lane.deployment,
            in_flight_requests=lane.in_flight,
            queued_requests=0 if absent else len(lane.line),
            parked_requests=(len(lane.line) if absent else 0) + lane.diverted,
            requests_total=lane.requests_total,
        )
        entry.last_request_time.FromMilliseconds(int((wall - (now - lane.last_request_seconds)) * 1000))
        p99_ms = lane.first_tokens.p99_ms(now)
        if p99_ms is not None:
            entry.first_token_p99_ms = p99_ms
        lane.diverted = 0
        found.append(entry)
    return found
