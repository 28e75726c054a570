"""A replica as the agent knows it: the order, the last observation, the engine's process, bookkeeping.

This is data with a few rules: the state only moves forward, and waking is an event. What happens in each
state stands in `nodeagent.lifecycle`; who calls it, in `nodeagent.supervisor`.
"""

import asyncio
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from millrace.core.v1 import replica_pb2, stats_pb2, types_pb2

from core.clock import Clock, from_timestamp, to_timestamp
from core.states import ReplicaState
from nodeagent.health import HealthTracker
from nodeagent.journal import JournalEntry
from nodeagent.runtimes.base import EngineProcess

# Reports travel in gRPC messages and end up in etcd values: a failure tells its story in this much.
MESSAGE_LENGTH_MAX = 1024
LOG_TAIL_LINES = 30
LOG_TAIL_LINE_LENGTH_MAX = 1000
# The control plane drains for an hour at most: a deadline beyond that comes from a clock that is wrong.
DRAIN_SECONDS_MAX = 3600.0


@dataclass(slots=True)
class Ending:
    """An end that has been decided and is being carried out.

    Attributes:
        state: State that the replica comes to.
        message: Why.
        kill_at: Monotonic time after which the engine is killed.
        give_up_at: Monotonic time after which the end is reported even if the process remains.
        asked: True once the engine has been asked to end.
    """

    state: ReplicaState
    message: str
    kill_at: float
    give_up_at: float
    asked: bool = False


@dataclass(slots=True)
class SampleHistory:
    """What scraping has seen of an engine. Times are monotonic; None is never.

    Attributes:
        latest: Last sample.
        latest_at: When it was taken.
        progress_at: When tokens or finished requests last increased.
    """

    latest: stats_pb2.EngineStats | None = None
    latest_at: float | None = None
    progress_at: float | None = None

    def add(self, sample: stats_pb2.EngineStats, now: float) -> None:
        """Takes a sample in."""
        earlier = self.latest
        if earlier is not None and (
            sample.generation_tokens_total > earlier.generation_tokens_total
            or sample.succeeded_requests_total > earlier.succeeded_requests_total
        ):
            self.progress_at = now
        self.latest, self.latest_at = sample, now


@dataclass(slots=True, eq=False)
class Replica:
    """One replica on this node.

    Attributes:
        assignment: The last order that was obeyed.
        observation: What is reported.
        log_path: The engine's log file.
        state_since: Monotonic time of the last change of state.
        port: Port of the engine; 0 while it has none.
        process: The engine; None where there is none (any more).
        drain_end_at: Monotonic time at which draining is over; None without a deadline.
        removed: No longer assigned: to be stopped and forgotten.
        halted: To be stopped because the agent stops with its engines.
        wake: Set when something happened that the next step should look at without waiting.
        ending: An end that is being carried out; None while there is none.
        health: Judgement of the health checks.
        samples: What scraping has seen.
        canary_at: Monotonic time of the last canary that was served.
        probes: Readiness probes so far; sets the wait before the next.
        idle_samples: Samples in a row without requests while draining.
    """

    assignment: replica_pb2.ReplicaAssignment
    observation: replica_pb2.ReplicaObservation
    log_path: Path
    state_since: float
    port: int = 0
    process: EngineProcess | None = None
    drain_end_at: float | None = None
    removed: bool = False
    halted: bool = False
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    ending: Ending | None = None
    health: HealthTracker = field(default_factory=HealthTracker)
    samples: SampleHistory = field(default_factory=SampleHistory)
    canary_at: float | None = None
    probes: int = 0
    idle_samples: int = 0

    @property
    def name(self) -> str:
        """The replica's id."""
        return self.assignment.replica

    @property
    def state(self) -> ReplicaState:
        """How far it has come."""
        return ReplicaState(self.observation.state)

    @property
    def external(self) -> bool:
        """True for a URL that someone else runs."""
        return self.assignment.launch.engine == types_pb2.ENGINE_EXTERNAL

    @property
    def serving(self) -> bool:
        """True while the engine can be scraped."""
        return self.state in {ReplicaState.READY, ReplicaState.DRAINING}

    def obey(self, assignment: replica_pb2.ReplicaAssignment) -> bool:
        """Takes a newer order; tells whether it was newer than the last, or the same leader's.

        Only whether and until when to drain can change: another launch is another replica.
        """
        if assignment.fencing_token < self.assignment.fencing_token:
            return False
        self.assignment.fencing_token = assignment.fencing_token
        self.assignment.generation = assignment.generation
        changed = (
            assignment.desired_state != self.assignment.desired_state
            or assignment.drain_deadline_time != self.assignment.drain_deadline_time
        )
        if changed:
            self.assignment.desired_state = assignment.desired_state
            self.assignment.drain_deadline_time.CopyFrom(assignment.drain_deadline_time)
            self.assignment.preempted_by = assignment.preempted_by
            self.wake.set()
        return True

    def note_drain_deadline(self, clock: Clock, sent_at: datetime | None) -> None:
        """Works out by our monotonic clock when draining is over.

        The deadline is a time of the control plane's clock. What counts is how much was left when the order
        was sent, so that a clock of ours that is wrong cuts no request off and holds up no end.

        Args:
            clock: Ours.
            sent_at: The control plane's time as it sent the order; None where it does not say: then the two
                clocks are taken to agree.
        """
        deadline = from_timestamp(self.assignment.drain_deadline_time)
        if deadline is None:
            self.drain_end_at = None
            return
        left_seconds = (deadline - (sent_at or clock.now())).total_seconds()
        self.drain_end_at = clock.monotonic() + min(DRAIN_SECONDS_MAX, max(0.0, left_seconds))

    def advance(
        self, state: ReplicaState, *, clock: Clock, message: str = "", log_tail: list[str] | None = None
    ) -> None:
        """Moves on to a later state.

        Raises:
            AssertionError: The state is not a later one: replicas never go back.
        """
        assert state > self.state, f"{self.name} cannot go from {self.state.name} to {state.name}"
        self.observation.state = types_pb2.ReplicaState.ValueType(state)
        self.observation.state_time.CopyFrom(to_timestamp(clock.now()))
        self.observation.message = message[:MESSAGE_LENGTH_MAX]
        self.observation.log_tail[:] = [line[:LOG_TAIL_LINE_LENGTH_MAX] for line in log_tail or ()]
        self.observation.healthy = state == ReplicaState.READY
        self.state_since = clock.monotonic()

    def take_sample(self, sample: stats_pb2.EngineStats, clock: Clock) -> None:
        """Gives a sample its identity and time, and keeps it."""
        sample.namespace = self.observation.namespace
        sample.deployment = self.observation.deployment
        sample.replica = self.name
        sample.incarnation = self.observation.incarnation
        sample.sample_time.CopyFrom(to_timestamp(clock.now()))
        self.samples.add(sample, clock.monotonic())

    def entry(self) -> JournalEntry:
        """Returns what the journal keeps."""
        return JournalEntry(
            assignment=self.assignment,
            observation=self.observation,
            process=self.process.identity if self.process is not None else None,
            port=self.port,
        )


def new_replica(
    assignment: replica_pb2.ReplicaAssignment, *, node: str, log_path: Path, clock: Clock
) -> Replica:
    """Takes up an assignment."""
    own = replica_pb2.ReplicaAssignment()
    own.CopyFrom(assignment)
    observation = replica_pb2.ReplicaObservation(
        namespace=assignment.namespace,
        deployment=assignment.deployment,
        deployment_uid=assignment.deployment_uid,
        replica=assignment.replica,
        generation=assignment.generation,
        node=node,
        state=types_pb2.REPLICA_STATE_ASSIGNED,
        state_time=to_timestamp(clock.now()),
        served_model_name=assignment.launch.served_model_name,
        engine=assignment.launch.engine,
    )
    return Replica(own, observation, log_path, clock.monotonic())


def replica_from_journal(entry: JournalEntry, *, log_path: Path, clock: Clock) -> Replica:
    """Rebuilds a replica as an earlier agent knew it, without its process."""
    healthy = entry.observation.healthy
    return Replica(
        entry.assignment,
        entry.observation,
        log_path,
        clock.monotonic(),
        port=entry.port,
        health=HealthTracker(healthy=healthy, unhealthy_since=None if healthy else clock.monotonic()),
        # The engine served before; the next canary is due a period from now, not at once.
        canary_at=clock.monotonic(),
    )
