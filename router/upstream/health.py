"""Passive health: an endpoint that failed is left alone for a while.

In come the outcomes of attempts, out comes whether an endpoint is ejected. The first failure ejects for 1 s,
unless the deployment has a breaker of its own; an ejection doubles with every further failure up to 30 s;
success or a new incarnation clears it. When it is over, one request probes the endpoint while the others stay
away until it has succeeded. This is one router's own short memory, beside the health checks of the control
plane; it never refuses a request.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from types import TracebackType

from core.backoff import BackoffPolicy
from core.clock import Clock
from router.view.view import Endpoint, Routing

# Shorter than a health check's verdict, so that it bridges exactly that gap; the maximum bounds how long
# an engine that has recovered goes unnoticed.
EJECTION = BackoffPolicy(initial_seconds=1.0, maximum_seconds=30.0)


@dataclass(frozen=True, slots=True)
class Breaker:
    """When an endpoint is left alone.

    Attributes:
        failures: Failures in a row after which it is; at least 1.
        ejection: How long.
    """

    failures: int = 1
    ejection: BackoffPolicy = EJECTION

    @classmethod
    def of(cls, routing: Routing) -> "Breaker":
        """Returns the breaker of a deployment."""
        first = routing.ejection_seconds
        ejection = EJECTION
        if first is not None:
            ejection = BackoffPolicy(
                initial_seconds=first, maximum_seconds=max(first, EJECTION.maximum_seconds)
            )
        return cls(routing.consecutive_failures or 1, ejection)


DEFAULT_BREAKER = Breaker()


@dataclass(slots=True)
class _Mark:
    incarnation: str
    failures: int
    failed_seconds: float
    ejected_until_seconds: float
    was_ejected: bool = False
    probing: bool = False


class Probe:
    """Whether one request probes an endpoint, for as long as the block of a `with` runs."""

    __slots__ = ("_mark",)

    def __init__(self, mark: _Mark | None) -> None:
        """Takes the endpoint's mark; None where there is nothing to probe."""
        self._mark = mark

    def begin(self) -> None:
        """The request begins."""
        if self._mark is not None:
            self._mark.probing = True

    def end(self) -> None:
        """The request has ended."""
        if self._mark is not None:
            self._mark.probing = False

    def __enter__(self) -> None:
        self.begin()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.end()


# Nearly every request's, so that it costs none an object.
_NO_PROBE = Probe(None)


class EndpointHealth:
    """Remembers failures by replica; bounded by `retain`."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._marks: dict[str, _Mark] = {}

    @property
    def clean(self) -> bool:
        """True where no endpoint has failed since it last answered."""
        return not self._marks

    def failed(self, endpoint: Endpoint, breaker: Breaker = DEFAULT_BREAKER) -> float:
        """Counts a failure that is not the client's and returns the ejection in seconds; 0 for none yet."""
        now = self._clock.monotonic()
        mark = self._mark(endpoint)
        if mark is None:
            mark = _Mark(endpoint.incarnation, 0, now, now)
            self._marks[endpoint.replica] = mark
        # Requests that were under way together fail together: they are one failure.
        if mark.failures == 0 or now >= mark.ejected_until_seconds:
            mark.failures += 1
            beyond = mark.failures - breaker.failures
            if beyond >= 0:
                mark.was_ejected = True
                mark.ejected_until_seconds = now + breaker.ejection.ceiling_seconds(beyond + 1)
        mark.failed_seconds = now
        return max(0.0, mark.ejected_until_seconds - now)

    def succeeded(self, endpoint: Endpoint) -> None:
        """Forgets the failures of an endpoint that answered."""
        if self._mark(endpoint) is not None:
            del self._marks[endpoint.replica]

    def is_ejected(self, endpoint: Endpoint) -> bool:
        """Tells whether an endpoint is left alone for now."""
        if not self._marks:
            return False
        mark = self._mark(endpoint)
        return mark is not None and (mark.probing or self._clock.monotonic() < mark.ejected_until_seconds)

    def probe(self, endpoint: Endpoint) -> "Probe":
        """Keeps others away from an endpoint whose ejection has just ended, while the block of a `with` runs.

        The block must call `succeeded` or `failed` where it knows; a block that ends without either, because
        the client left, lets the next request probe. For an endpoint without failures it does nothing.
        """
        mark = self._mark(endpoint) if self._marks else None
        if mark is None or not mark.was_ejected or self.is_ejected(endpoint):
            return _NO_PROBE
        return Probe(mark)

    def last_failure_seconds(self, endpoint: Endpoint) -> float:
        """Returns when an endpoint failed last, on the monotonic clock; minus infinity for never."""
        mark = self._mark(endpoint)
        return float("-inf") if mark is None else mark.failed_seconds

    def retain(self, endpoints: Iterable[Endpoint]) -> None:
        """Forgets all other endpoints, and those with another incarnation."""
        if not self._marks:
            return
        kept = {endpoint.identity for endpoint in endpoints}
        self._marks = {
            replica: mark for replica, mark in self._marks.items() if (replica, mark.incarnation) in kept
        }

    def _mark(self, endpoint: Endpoint) -> _Mark | None:
        mark = self._marks.get(endpoint.replica)
        return mark if mark is not None and mark.incarnation == endpoint.incarnation else None
