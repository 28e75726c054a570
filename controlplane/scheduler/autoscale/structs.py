"""The words of autoscaling: what a user allows, what was measured at one moment, what is decided.

Frozen values, no protobuf, no clock. Times are aware UTC datetimes. What was not measured is absent, never 0.
"""

from dataclasses import dataclass
from datetime import datetime, time, timedelta, tzinfo


@dataclass(frozen=True, slots=True)
class Thresholds:
    """Limits of what is measured; means over the wanted replicas.

    Attributes:
        utilization_out: Device utilisation, 0 to 1, above which replicas are added.
        utilization_in: Device utilisation below which some may go.
        waiting_out: Waiting requests a replica above which replicas are added.
        waiting_in_period: How long nothing may have waited before some may go.
        first_token_p99_out_ms: 99th percentile of the time to first token above which one is added.
        first_token_p99_in_ms: The same below which some may go.
        kv_usage_out: Key/value cache use, 0 to 1, above which replicas are added.
        kv_usage_in: The same below which some may go.
    """

    utilization_out: float = 0.8
    utilization_in: float = 0.2
    waiting_out: float = 10.0
    waiting_in_period: timedelta = timedelta(seconds=300)
    first_token_p99_out_ms: float = 2000.0
    first_token_p99_in_ms: float = 500.0
    kv_usage_out: float = 0.9
    kv_usage_in: float = 0.5


@dataclass(frozen=True, slots=True)
class Window:
    """A time of the week with a floor of its own.

    Attributes:
        name: As the user wrote it, for events.
        days: On which it starts; 0 is Monday.
        start: Local time at which it starts.
        end: Local time at which it ends; not later than the start means on the next day.
        zone: Zone of both.
        replicas: Fewest replicas while it lasts.
        warm_up: How long before its start the replicas are started.
    """

    name: str
    days: frozenset[int]
    start: time
    end: time
    zone: tzinfo
    replicas: int
    warm_up: timedelta = timedelta(0)


@dataclass(frozen=True, slots=True)
class AutoscalePolicy:
    """What a user allows.

    Attributes:
        min_replicas: Fewest outside the windows.
        max_replicas: Most, always.
        thresholds: Limits of what is measured.
        cooldown_out: Least time between two steps out.
        cooldown_in: Least time between any step and a step in.
        idle_timeout: Time without a request before the step to zero.
        windows: Times of the week with floors of their own.
        observation: Time over which measures are averaged.
    """

    min_replicas: int = 1
    max_replicas: int = 1
    thresholds: Thresholds = Thresholds()
    cooldown_out: timedelta = timedelta(seconds=60)
    cooldown_in: timedelta = timedelta(seconds=300)
    idle_timeout: timedelta = timedelta(seconds=300)
    windows: tuple[Window, ...] = ()
    observation: timedelta = timedelta(seconds=30)


@dataclass(frozen=True, slots=True)
class Measure:
    """A sum over the replicas that report it, and their number."""

    total: float = 0.0
    known: int = 0


@dataclass(frozen=True, slots=True)
class Demand:
    """What all routers see of the requests for a deployment.

    Attributes:
        in_flight: Requests at engines.
        queued: Requests that wait because every endpoint is saturated.
        parked: Requests that wait because there is no endpoint.
        last_request_time: When the last one came; None where no router remembers one.
        first_token_p99_ms: The worst router's 99th percentile of the time to first token over a minute; None
            without requests.
    """

    in_flight: int = 0
    queued: int = 0
    parked: int = 0
    last_request_time: datetime | None = None
    first_token_p99_ms: float | None = None


@dataclass(frozen=True, slots=True)
class Reading:
    """What is known of a deployment at one moment.

    Attributes:
        time: The moment.
        serving: Replicas that take requests.
        sampled: How many of them have a fresh sample.
        running: Requests in their batches.
        waiting: Requests that wait in the engines.
        utilization: Device utilisation, 0 to 1 each.
        kv_usage: Key/value cache use, 0 to 1 each.
        demand: What routers see; None where no router reports.
    """

    time: datetime
    serving: int
    sampled: int
    running: Measure = Measure()
    waiting: Measure = Measure()
    utilization: Measure = Measure()
    kv_usage: Measure = Measure()
    demand: Demand | None = None

    @property
    def complete(self) -> bool:
        """True when every replica that serves has a fresh sample."""
        return self.sampled >= self.serving

    @property
    def waiting_total(self) -> float:
        """Requests known to wait, in engines and routers: at least so many do."""
        at_routers = self.demand.queued + self.demand.parked if self.demand is not None else 0
        return self.waiting.total + at_routers


@dataclass(frozen=True, slots=True)
class Floor:
    """Fewest replicas at a moment, and the window that says so; empty for the policy itself."""

    replicas: int
    window: str = ""


@dataclass(frozen=True, slots=True)
class State:
    """What is kept between two decisions, over a change of the leader too.

    Attributes:
        desired: Replicas wanted.
        waiting_time: When a request was last known to wait, or could have waited unseen.
        active_time: When a request was last seen, or could have come unseen.
        floor: Floor at the last decision.
        reason: Of the last decision, in CamelCase.
        message: Of the last decision, with the figures.
        out_time: When the number last grew; None if never.
        step_time: When the number last changed; None if never.
    """

    desired: int
    waiting_time: datetime
    active_time: datetime
    floor: int = 0
    reason: str = ""
    message: str = ""
    out_time: datetime | None = None
    step_time: datetime | None = None


@dataclass(frozen=True, slots=True)
class Decision:
    """What was decided.

    Attributes:
        state: To be kept; its `desired` is the decision, its `reason` and `message` the why.
        step: True when the number changed.
    """

    state: State
    step: bool
