"""Prometheus metrics of a router, with bounded labels.

In come finished requests, attempts and the state of the view; out comes the text page. Label values are
closed sets: routes, status classes, reasons, causes, owners, endpoint states; never text of a request.
With several workers each writes its numbers to files that any of them adds up for the page
(`PROMETHEUS_MULTIPROC_DIR`, set by the supervisor).
"""

import os
from bisect import bisect_left
from collections import Counter as Tally

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, multiprocess

from core.telemetry import render_metrics
from router.metering.usage import COMPLETE, TokenCounts, Usage, UsageOutcome
from router.openai.errors import Reason
from router.upstream.failures import Cause, Owner
from router.view.view import EndpointState, View

MULTIPROCESS_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"

# From what the router itself adds to the longest whole answer.
_SECONDS = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 600.0,
)  # fmt: skip


class _Times:
    """Times of many requests, counted into the buckets of a histogram.

    Attributes:
        taken: How many.
    """

    __slots__ = ("_buckets", "_sum_seconds", "taken")

    def __init__(self) -> None:
        self.taken = 0
        self._sum_seconds = 0.0
        self._buckets = [0] * (len(_SECONDS) + 1)

    def add(self, seconds: float) -> None:
        """Counts one."""
        self.taken += 1
        self._sum_seconds += seconds
        self._buckets[bisect_left(_SECONDS, seconds)] += 1

    def move_to(self, histogram: Histogram) -> None:
        """Adds all to a histogram with the same buckets, and begins anew."""
        # Its public method takes one at a time and looks for the bucket of each again.
        for value, count in zip(histogram._buckets, self._buckets, strict=True):  # noqa: SLF001 - as above
            if count:
                value.inc(count)
        histogram._sum.inc(self._sum_seconds)  # noqa: SLF001 - as above
        self.taken = 0
        self._sum_seconds = 0.0
        self._buckets = [0] * (len(_SECONDS) + 1)


class _Ended:
    """Requests of one route that ended in one way.

    Attributes:
        status_class: First digit of the status.
        reason: Why.
        count: How many.
    """

    __slots__ = ("count", "reason", "status_class")

    def __init__(self, status_class: int, reason: Reason) -> None:
        self.status_class = status_class
        self.reason = reason
        self.count = 0


class _Route:
    """Requests of one route.

    Attributes:
        durations: Of all.
        first_bytes: Of those that engines answered.
        usual: How the latest one ended, and probably the next one does.
        others: By the ways in which they ended.
    """

    __slots__ = ("durations", "first_bytes", "others", "usual")

    def __init__(self) -> None:
        self.durations = _Times()
        self.first_bytes = _Times()
        self.usual = _Ended(2, Reason.OK)
        self.others: dict[tuple[int, Reason], _Ended] = {(2, Reason.OK): self.usual}

    def other(self, status_class: int, reason: Reason) -> _Ended:
        """Returns another way of ending than the latest one, which is the usual one from now on."""
        found = self.others.get((status_class, reason))
        if found is None:
            found = self.others[status_class, reason] = _Ended(status_class, reason)
        self.usual = found
        return found


class _Used:
    """Usage of many requests.

    Attributes:
        requests: How many.
        prompt: Tokens of their prompts.
        completion: Tokens produced.
        cached: Tokens of prompts that came from a cache.
    """

    __slots__ = ("cached", "completion", "prompt", "requests")

    def __init__(self) -> None:
        self.requests = 0
        self.prompt = 0
        self.completion = 0
        self.cached = 0

    def add(self, counts: TokenCounts) -> None:
        """Counts one."""
        self.requests += 1
        if counts.prompt is not None:
            self.prompt += counts.prompt
        if counts.completion is not None:
            self.completion += counts.completion
        if counts.cached is not None:
            self.cached += counts.cached


class RouterMetrics:
    """The metric objects of one worker."""

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        """Registers the metrics; a registry of its own keeps tests apart."""
        self._registry = CollectorRegistry() if registry is None else registry
        self._requests = Counter(
            "millrace_router_requests",
            "Requests that ended, by route, class of the HTTP status and reason.",
            ["route", "status_class", "reason"],
            registry=self._registry,
        )
        self._duration = Histogram(
            "millrace_router_request_duration_seconds",
            "Time from a request's headers to the end of its answer.",
            ["route"],
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._first_byte = Histogram(
            "millrace_router_time_to_first_byte_seconds",
            "Time from a request's headers to the first byte of the engine's answer.",
            ["route"],
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._in_flight = Gauge(
            "millrace_router_inflight_requests",
            "Requests that are being served.",
            registry=self._registry,
            multiprocess_mode="livesum",
        )
        self._retries = Counter(
            "millrace_router_retries",
            "Attempts that were repeated, by what had made the one before fail.",
            ["cause"],
            registry=self._registry,
        )
        self._upstream_errors = Counter(
            "millrace_router_upstream_errors",
            "Errors on the way to and from engines, by whose fault they are.",
            ["owner"],
            registry=self._registry,
        )
        self._view_age = Gauge(
            "millrace_router_view_age_seconds",
            "Time since the store was last heard; infinite before the first time.",
            registry=self._registry,
            multiprocess_mode="livemax",
        )
        self._endpoints = Gauge(
            "millrace_router_endpoints",
            "Endpoints in the view, by state.",
            ["state"],
            registry=self._registry,
            multiprocess_mode="livemax",
        )
        self._index_blocks = self._sum(
            "millrace_router_prefix_index_blocks",
            "Blocks in the prefix index, each counted once for every endpoint that probably holds it.",
        )
        self._index_bytes = self._sum(
            "millrace_router_prefix_index_bytes", "Memory of the prefix index, estimated."
        )
        self._register_waiting()
        self._register_usage()
        self._open = 0
        # Bounded like the labels: closed sets, all of them.
        self._routes: dict[str, _Route] = {}
        self._usual = _Used()
        self._used: dict[tuple[UsageOutcome, bool], _Used] = {(COMPLETE, True): self._usual}
        self._begin_series()

    def _begin_series(self) -> None:
        """Makes the series of closed sets: an alert on a rate must not miss the first event."""
        for cause in Cause:
            self._retries.labels(cause.value)
        for owner in Owner:
            self._upstream_errors.labels(owner.value)
        self.view_changed(View())

    def _register_usage(self) -> None:
        self._tokens = Counter(
            "millrace_router_tokens",
            "Tokens of requests that engines answered, by kind (cached ones are also in prompt) and outcome.",
            ["kind", "outcome"],
            registry=self._registry,
        )
        self._metered = Counter(
            "millrace_router_metered_requests",
            "Requests that were sent to an engine, by outcome and by whether their tokens are known exactly.",
            ["outcome", "exact"],
            registry=self._registry,
        )

    def _register_waiting(self) -> None:
        self._queued = self._sum(
            "millrace_router_queued_requests", "Requests that wait because every endpoint is saturated."
        )
        self._parked = self._sum(
            "millrace_router_parked_requests", "Requests that wait because their deployment has no endpoint."
        )
        self._queue_bytes = self._sum("millrace_router_queue_bytes", "Bodies of requests that wait.")
        self._queue = Histogram(
            "millrace_router_queue_seconds",
            "Time that requests waited for room; those that did not wait are not counted.",
            buckets=_SECONDS,
            registry=self._registry,
        )

    def _sum(self, name: str, text: str) -> Gauge:
        """Makes a gauge that is added up over the workers."""
        return Gauge(name, text, registry=self._registry, multiprocess_mode="livesum")

    def request_started(self) -> None:
        """Counts a request in."""
        self._open += 1

    def request_ended(
        self,
        *,
        route: str,
        status: int,
        reason: Reason,
        duration_seconds: float,
        first_byte_seconds: float | None,
    ) -> None:
        """Counts a request out.

        Args:
            route: Template of the route, or `other`.
            status: HTTP status; 499 for a client that left.
            reason: Why it ended.
            duration_seconds: Of the whole request.
            first_byte_seconds: Until the engine's first byte; None where there was none.
        """
        self._open -= 1
        found = self._routes.get(route)
        if found is None:
            found = self._routes[route] = _Route()
        ended, status_class = found.usual, status // 100
        if ended.reason is not reason or ended.status_class != status_class:
            ended = found.other(status_class, reason)
        ended.count += 1
        found.durations.add(duration_seconds)
        if first_byte_seconds is not None:
            found.first_bytes.add(first_byte_seconds)

    def flush(self) -> None:
        """Hands what was counted to the metric objects, each of whose calls costs as much as all of that."""
        self._in_flight.set(self._open)
        for name, route in self._routes.items():
            for ended in route.others.values():
                if ended.count:
                    labels = (name, f"{ended.status_class}xx", ended.reason.value)
                    self._requests.labels(*labels).inc(ended.count)
                    ended.count = 0
            if route.durations.taken:
                route.durations.move_to(self._duration.labels(name))
            if route.first_bytes.taken:
                route.first_bytes.move_to(self._first_byte.labels(name))
        for (outcome, exact), used in self._used.items():
            if used.requests:
                self._metered.labels(outcome.value, "yes" if exact else "no").inc(used.requests)
                for kind in ("prompt", "completion", "cached"):
                    self._tokens.labels(kind, outcome.value).inc(getattr(used, kind))
        self._usual = _Used()
        self._used = {(COMPLETE, True): self._usual}

    def retried(self, cause: Cause) -> None:
        """Counts a repeated attempt."""
        self._retries.labels(cause.value).inc()

    def upstream_error(self, owner: Owner) -> None:
        """Counts an error by its owner."""
        self._upstream_errors.labels(owner.value).inc()

    def take(self, usage: Usage) -> None:
        """Counts the usage of one request; implements `UsageSink`."""
        self.settled(usage.outcome, usage.counts)

    def settled(self, outcome: UsageOutcome, counts: TokenCounts) -> None:
        """Counts the usage of one request; all that `take` does, for those who have no `Usage`."""
        if outcome is COMPLETE and counts.exact:
            self._usual.add(counts)
            return
        key = (outcome, counts.exact)
        used = self._used.get(key)
        if used is None:
            used = self._used[key] = _Used()
        used.add(counts)

    def view_changed(self, view: View) -> None:
        """Takes the numbers of a new view."""
        tally = Tally(endpoint.state for endpoint in view.endpoints)
        for state in EndpointState:
            self._endpoints.labels(state.name.lower()).set(tally[state])

    def view_aged(self, age_seconds: float) -> None:
        """Takes the age of the view."""
        self._view_age.set(age_seconds)

    def index_measured(self, blocks: int, size_bytes: int) -> None:
        """Takes the size of the prefix index."""
        self._index_blocks.set(blocks)
        self._index_bytes.set(size_bytes)

    def waiting_measured(self, queued: int, parked: int, size_bytes: int) -> None:
        """Takes who waits now, and the memory that it takes."""
        self._queued.set(queued)
        self._parked.set(parked)
        self._queue_bytes.set(size_bytes)

    def waited(self, seconds: float) -> None:
        """Counts one wait for room, whatever came of it."""
        self._queue.observe(seconds)

    def page(self) -> tuple[bytes, str]:
        """Returns the text page of all workers, and its content type; others' numbers may be a second old."""
        self.flush()
        if MULTIPROCESS_VARIABLE in os.environ:
            registry = CollectorRegistry()
            multiprocess.MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
            return render_metrics(registry)
        return render_metrics(self._registry)
