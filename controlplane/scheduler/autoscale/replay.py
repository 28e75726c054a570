"""A policy tried on a load: what the autoscaler would have done, and what requests would have felt.

In come a policy, a load as requests a second over time, and a simple model of a replica; out come the moments
and their summary. The model: a replica serves so many requests a second, the rest waits in one queue, and a
new replica serves after its start time. It knows neither batches nor prompts: it shows what a policy does,
and does not predict a latency. Pure; equal arguments give equal replays.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from controlplane.scheduler.autoscale.decide import LATENCY_MEMORY, decide
from controlplane.scheduler.autoscale.structs import AutoscalePolicy, Demand, Measure, Reading, State

LATE_SECONDS = 2.0
"""A request that waited longer counts as late: the default limit of the time to first token."""


@dataclass(frozen=True, slots=True)
class ServiceModel:
    """What a replica can do.

    Attributes:
        requests_per_second: Requests that it serves a second.
        request_seconds: How long it works on one.
        start: Time from the order to the first served token.
        first_token_ms: Time to first token without waiting.
    """

    requests_per_second: float = 2.0
    request_seconds: float = 5.0
    start: timedelta = timedelta(seconds=90)
    first_token_ms: float = 150.0


@dataclass(frozen=True, slots=True)
class Load:
    """Requests a second from a moment on, until the next entry."""

    time: datetime
    requests_per_second: float


@dataclass(frozen=True, slots=True)
class Moment:
    """One tick of a replay.

    Attributes:
        time: When.
        requests_per_second: What comes in.
        desired: Replicas wanted after the decision.
        serving: Replicas that serve.
        floor: Fewest replicas at that time.
        queued: Requests that wait.
        utilization: Share of the serving replicas' capacity in use; None without any.
        step: Why the number of replicas changed; empty when it did not.
        reason: Of the step, in CamelCase.
    """

    time: datetime
    requests_per_second: float
    desired: int
    serving: int
    floor: int
    queued: int
    utilization: float | None
    step: str = ""
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Summary:
    """A replay in figures.

    Attributes:
        requests: Requests that came.
        late: How many of them waited longer than `LATE_SECONDS`.
        longest_wait: Of one request.
        unserved: Requests that still waited at the end.
        replica_hours: Replicas wanted, over time.
        fixed_hours: What the most replicas ever wanted would have taken, kept all the time.
        steps: Changes of the number of replicas.
        most: Most replicas wanted.
    """

    requests: int
    late: int
    longest_wait: timedelta
    unserved: int
    replica_hours: float
    fixed_hours: float
    steps: int
    most: int


@dataclass(slots=True)
class _World:
    """Replicas and requests while time goes on."""

    model: ServiceModel
    serving: int
    starting: list[datetime] = field(default_factory=list)
    queue: deque[tuple[datetime, int]] = field(default_factory=deque)
    queued: int = 0
    owed: float = 0.0
    credit: float = 0.0
    busy: float | None = None
    last_request: datetime | None = None
    requests: int = 0
    late: int = 0
    longest_wait: timedelta = timedelta(0)
    recent: deque[tuple[datetime, float, int]] = field(default_factory=deque)

    def advance(self, load: float, now: datetime, seconds: float) -> None:
        """Lets requests come and be served for one tick that ends now."""
        ready = [each for each in self.starting if each <= now]
        self.serving += len(ready)
        self.starting = [each for each in self.starting if each > now]
        self.owed += load * seconds
        came, self.owed = int(self.owed), self.owed - int(self.owed)
        if came:
            self.requests += came
            self.queued += came
            self.queue.append((now, came))
            self.last_request = now
        room = self.serving * self.model.requests_per_second * seconds
        # What is not used of a tick is lost, but for the fraction of a request.
        self.credit = min(self.credit, 1.0) + room if room else 0.0
        served = min(self.queued, int(self.credit))
        self.credit -= served
        self.busy = min(1.0, served / room) if room else None
        self._serve(served, now)

    def _serve(self, count: int, now: datetime) -> None:
        self.queued -= count
        while count:
            came_at, waiting = self.queue.popleft()
            taken = min(count, waiting)
            count -= taken
            wait = now - came_at
            self.longest_wait = max(self.longest_wait, wait)
            self.recent.append((now, wait.total_seconds(), taken))
            if wait.total_seconds() > LATE_SECONDS:
                self.late += taken
            if waiting > taken:
                self.queue.appendleft((came_at, waiting - taken))

    def scale(self, desired: int, now: datetime) -> None:
        """Starts what is missing, and gives up what is too much: those that still start first."""
        missing = desired - self.serving - len(self.starting)
        self.starting += [now + self.model.start] * max(0, missing)
        for _ in range(max(0, -missing)):
            if self.starting:
                self.starting.pop()
            else:
                self.serving -= 1

    def reading(self, now: datetime) -> Reading:
        """What would be measured."""
        busy = self.busy or 0.0
        rate = self.serving * self.model.requests_per_second
        demand = Demand(
            in_flight=round(busy * rate * self.model.request_seconds),
            parked=0 if self.serving else self.queued,
            last_request_time=self.last_request,
            first_token_p99_ms=self._p99_ms(now),
        )
        return Reading(
            time=now,
            serving=self.serving,
            sampled=self.serving,
            waiting=Measure(self.queued if self.serving else 0, self.serving),
            utilization=Measure(busy * self.serving, self.serving),
            demand=demand,
        )

    def _p99_ms(self, now: datetime) -> float | None:
        """99th percentile of the time to first token of what was served in the last minute."""
        while self.recent and self.recent[0][0] <= now - LATENCY_MEMORY:
            self.recent.popleft()
        left = sum(count for _, _, count in self.recent) / 100
        for _, wait_seconds, count in sorted(self.recent, key=lambda each: -each[1]):
            left -= count
            if left <= 0:
                return self.model.first_token_ms + 1000 * wait_seconds
        return None


def replay(
    policy: AutoscalePolicy,
    loads: Sequence[Load],
    model: ServiceModel,
    *,
    first: int = 1,
    tick: timedelta = timedelta(seconds=5),
) -> tuple[list[Moment], Summary]:
    """Runs a policy over a load.

    Args:
        policy: What is tried.
        loads: In the order of time; the last one marks the end.
        model: Of a replica.
        first: Replicas at the beginning, which serve at once.
        tick: Time between two decisions.

    Raises:
        ValueError: There is no time between the first and the last load.
    """
    if len(loads) < 2 or loads[-1].time <= loads[0].time:
        raise ValueError("a series needs at least two moments, in the order of time")
    first = min(max(first, policy.min_replicas), policy.max_replicas)
    world = _World(model, serving=first)
    state: State | None = None
    memory = max(policy.observation, LATENCY_MEMORY)
    readings: deque[Reading] = deque(maxlen=max(2, int(memory / tick) + 1))
    moments: list[Moment] = []
    for now, load in _ticks(loads, tick):
        world.advance(load, now, tick.total_seconds())
        readings.append(world.reading(now))
        decision = decide(policy, readings, state, now, first=first)
        state = decision.state
        world.scale(state.desired, now)
        moments.append(
            Moment(
                time=now,
                requests_per_second=load,
                desired=state.desired,
                serving=world.serving,
                floor=state.floor,
                queued=world.queued,
                utilization=world.busy,
                step=state.message if decision.step else "",
                reason=state.reason if decision.step else "",
            )
        )
    return moments, _summary(world, moments, tick)


def _ticks(loads: Sequence[Load], tick: timedelta) -> Iterator[tuple[datetime, float]]:
    index, now = 0, loads[0].time
    while now < loads[-1].time:
        while loads[index + 1].time <= now:
            index += 1
        yield now, loads[index].requests_per_second
        now += tick


def _summary(world: _World, moments: Sequence[Moment], tick: timedelta) -> Summary:
    hours = tick.total_seconds() / 3600
    most = max(each.desired for each in moments)
    end = moments[-1].time
    # Those that still wait count with what they have waited so far.
    waiting = [(end - came_at, count) for came_at, count in world.queue]
    late = sum(count for wait, count in waiting if wait.total_seconds() > LATE_SECONDS)
    return Summary(
        requests=world.requests,
        late=world.late + late,
        longest_wait=max([world.longest_wait, *(wait for wait, _ in waiting)]),
        unserved=world.queued,
        replica_hours=sum(each.desired for each in moments) * hours,
        fixed_hours=most * len(moments) * hours,
        steps=sum(1 for each in moments if each.step),
        most=most,
    )
