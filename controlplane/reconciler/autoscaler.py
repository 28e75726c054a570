"""The autoscaler's loop: once a second, for deployments with a policy, from readings to a number in the plan.

In come the leader's view, engines' samples and routers' demand; out go guarded writes of the autoscaler's
part of `plan/deployments/` and an event for every step, with its figures. What to do is decided by
`scheduler.autoscale`. It runs only while this process leads, and never writes without the leader's key among
the conditions. The spec is never touched.
"""

import asyncio
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import Protocol

import structlog
from millrace.core.v1 import replica_pb2
from millrace.state.v1 import records_pb2
from prometheus_client import Counter

from controlplane.convert import autoscaled, declared_replicas
from controlplane.events import EventSink
from controlplane.reconciler.autoscale_policy import delayed, policy_of, record_of, state_of
from controlplane.reconciler.readings import Gauges, on_cpu_shares, reading_of, serving_replicas
from controlplane.reconciler.view import ClusterView, View
from controlplane.scheduler.autoscale import AutoscalePolicy, Reading, State, decide
from core.clock import Clock
from core.store import Compare, Put, Store, StoreError, keys
from core.store.waiting import is_set_within
from core.tasks import cancel_and_wait

_log = structlog.get_logger(__name__)

SOURCE = "scheduler"
TICK_SECONDS = 1.0
# Without any policy it only waits for one; see the loop.
RESYNC_SECONDS = 30.0
# A first listing of a healthy store takes milliseconds; see the loop.
SYNC_SECONDS = 15.0
# Own writes come back within milliseconds.
ECHO_SECONDS = 5.0
# What only moves on (when a request was last seen) is written so often at most; a new leader adds as much.
PERSIST = timedelta(seconds=30)
# A reason is worth telling once it has lasted, and one that changes to and fro only so often.
REASON_SETTLED = timedelta(seconds=10)
REASON_PERSIST = timedelta(seconds=60)
# Readings of the longest memory, a minute, at one a second, with some to spare for wake-ups between.
READINGS_MAX = 128
_WARNINGS = frozenset({"DataMissing", "AtMaximum"})

_steps = Counter("millrace_autoscaler_steps_total", "Steps of the autoscaler", ["reason"])
_conflicts = Counter(
    "millrace_autoscaler_conflicts_total", "Decisions not written because a record had changed"
)


class Guard(Protocol):
    """What the autoscaler needs of the leadership."""

    def compare(self) -> Compare:
        """The condition that holds only while we lead."""
        ...


@dataclass(slots=True)
class _Memory:
    """What is kept in this process for one deployment."""

    uid: str
    generation: int
    policy: AutoscalePolicy
    state: State | None
    written: State | None
    written_at: datetime | None = None
    reason_since: datetime | None = None
    readings: "deque[Reading]" = field(default_factory=lambda: deque(maxlen=READINGS_MAX))


class Autoscaler:
    """Decides for every deployment with a policy."""

    def __init__(
        self, store: Store, clock: Clock, guard: Guard, events: EventSink, cluster: ClusterView
    ) -> None:
        self._store = store
        self._clock = clock
        self._guard = guard
        self._events = events
        self._cluster = cluster
        self._memories: dict[str, _Memory] = {}
        self._broken: dict[str, int] = {}
        self._parked = asyncio.Event()
        self._changed = asyncio.Event()
        self._seen: tuple[object, dict[str, records_pb2.DeploymentRecord]] = (None, {})
        cluster.subscribe(self._changed.set)

    async def run(self) -> None:
        """Works until cancelled.

        Raises:
            StoreError: A write's outcome is not known, which ends the lead.
        """
        await self._wait_for_targets()
        # Samples of a large cluster are many: they are followed only where somebody wants them.
        gauges = Gauges(self._store, self._clock)
        gauges.subscribe(self._parked.set)
        mirrors = asyncio.create_task(gauges.run(), name="autoscaler-mirrors")
        try:
            await gauges.wait_synced(SYNC_SECONDS)
            await self._ticks(gauges)
        finally:
            await cancel_and_wait(mirrors)

    async def _ticks(self, gauges: Gauges) -> None:
        while True:
            await self._wait_for_targets()
            self._parked.clear()
            await self._tick(gauges)
            await is_set_within(self._clock, TICK_SECONDS, self._parked)

    async def _wait_for_targets(self) -> None:
        while not self._targets(self._cluster.take()):
            self._forget({})
            self._changed.clear()
            await is_set_within(self._clock, RESYNC_SECONDS, self._changed)

    def _targets(self, view: View) -> dict[str, records_pb2.DeploymentRecord]:
        """Deployments with a policy, by `namespace/name`; worked out once for each change of the specs."""
        if self._seen[0] is not view.deployments:
            found = {
                key.removeprefix(keys.SPEC_DEPLOYMENTS): record
                for key, record in view.deployments.items()
                if autoscaled(record.spec)
            }
            self._seen = (view.deployments, found)
        return self._seen[1]

    def _forget(self, targets: Mapping[str, object]) -> None:
        for name in self._memories.keys() - targets.keys():
            del self._memories[name]
        for name in self._broken.keys() - targets.keys():
            del self._broken[name]

    async def _tick(self, gauges: Gauges) -> None:
        view, now = self._cluster.take(), self._clock.now()
        targets = self._targets(view)
        self._forget(targets)
        assignments, observations = _of_deployments(view, targets)
        demands = gauges.demands()
        for name, record in targets.items():
            concluded = view.conclusions.get(keys.PLAN_DEPLOYMENTS + name)
            if concluded is None or concluded.deployment_uid != record.uid:
                # The loop concludes first: there is nothing to add a number to.
                continue
            serving = serving_replicas(assignments.get(name, ()), observations.get(name, {}), record.uid)
            samples = [sample for each in serving if (sample := gauges.fresh(name, each)) is not None]
            reading = reading_of(
                now,
                len(serving),
                samples,
                demands.get(name, ()),
                routers=gauges.routers,
                cpu_shares=on_cpu_shares(assignments.get(name, ()), view.nodes),
            )
            try:
                memory = self._memory(name, record, concluded, now)
                memory.readings.append(reading)
                await self._decide(name, record, concluded, memory, now)
            except StoreError:
                raise
            except Exception as error:  # noqa: BLE001 - one odd policy must not stop the others' scaling
                self._complain(name, record, error)

    def _complain(self, name: str, record: records_pb2.DeploymentRecord, error: Exception) -> None:
        """Says once a generation that a deployment cannot be scaled."""
        if self._broken.get(name) == record.generation:
            return
        self._broken[name] = record.generation
        _log.error("deployment cannot be autoscaled", deployment=name, error=repr(error))
        self._events.emit(
            namespace=record.namespace,
            deployment=record.name,
            reason="AutoscaleFailed",
            message=f"the number of replicas stays as it is: {error}",
            source=SOURCE,
            warning=True,
        )

    def _memory(
        self,
        name: str,
        record: records_pb2.DeploymentRecord,
        concluded: records_pb2.DeploymentPlanRecord,
        now: datetime,
    ) -> _Memory:
        memory = self._memories.get(name)
        if memory is not None and memory.uid == record.uid:
            if memory.generation != record.generation:
                memory.policy, memory.generation = policy_of(record.spec.autoscale), record.generation
            return memory
        kept = state_of(concluded.autoscale) if concluded.HasField("autoscale") else None
        memory = _Memory(
            uid=record.uid,
            generation=record.generation,
            policy=policy_of(record.spec.autoscale),
            state=delayed(kept, now, PERSIST) if kept is not None else None,
            written=kept,
            written_at=now if kept is not None else None,
        )
        self._memories[name] = memory
        return memory

    async def _decide(
        self,
        name: str,
        record: records_pb2.DeploymentRecord,
        concluded: records_pb2.DeploymentPlanRecord,
        memory: _Memory,
        now: datetime,
    ) -> None:
        first = declared_replicas(record.spec)
        state, before = memory.state, memory.written
        if state is not None and concluded.autoscale.first_replicas != first:
            # Someone has set another first number: it holds until what is measured says otherwise.
            grown = first > state.desired
            out_time = now if grown else state.out_time
            state = replace(state, desired=first, step_time=now, out_time=out_time)
        decision = decide(memory.policy, memory.readings, state, now, first=first)
        after = decision.state
        if before is not None and after.desired != before.desired and not decision.step:
            message = f"{before.desired} -> {after.desired}: the spec asks for another first number"
            after = replace(after, reason="FirstNumberChanged", message=message)
        if memory.reason_since is None or state is None or state.reason != after.reason:
            memory.reason_since = now
        settled = now - memory.reason_since >= REASON_SETTLED
        if not _worth_writing(before, after, now, memory.written_at, settled=settled):
            memory.state = after
            return
        if not await self._write(name, record, after, first):
            # Someone wrote at the same time; the next look decides anew, from what is there then.
            return
        memory.state, memory.written, memory.written_at = after, after, now
        self._tell(record, before, after)

    async def _write(self, name: str, record: records_pb2.DeploymentRecord, state: State, first: int) -> bool:
        """Writes the autoscaler's part of the plan's record; False when something else has changed."""
        key, spec_key = keys.PLAN_DEPLOYMENTS + name, keys.SPEC_DEPLOYMENTS + name
        # Record and revision of one moment: the loop may have concluded anew since this look began.
        view = self._cluster.take()
        concluded, present = view.conclusions.get(key), view.deployments.get(spec_key)
        if concluded is None or concluded.deployment_uid != record.uid or present != record:
            return False
        revisions = view.revisions
        after = records_pb2.DeploymentPlanRecord()
        after.CopyFrom(concluded)
        after.autoscale.CopyFrom(record_of(state, first))
        outcome = await self._store.commit(
            [Put(key, after.SerializeToString(deterministic=True))],
            compares=[
                Compare(key, mod_revision=revisions(key)),
                Compare(spec_key, mod_revision=revisions(spec_key)),
                self._guard.compare(),
            ],
        )
        if not outcome.succeeded:
            _conflicts.inc()
            return False
        await self._cluster.wait_for({key: outcome.revision}, ECHO_SECONDS)
        return True

    def _tell(self, record: records_pb2.DeploymentRecord, before: State | None, after: State) -> None:
        """Emits an event for a step, and for a reason to worry that is new."""
        step = before is not None and before.desired != after.desired
        worry = after.reason in _WARNINGS and (before is None or before.reason != after.reason)
        if step:
            _steps.labels(reason=after.reason).inc()
        if step or worry:
            self._events.emit(
                namespace=record.namespace,
                deployment=record.name,
                reason=after.reason if step else f"Autoscale{after.reason}",
                message=after.message,
                source=SOURCE,
                warning=worry and not step,
            )


def _worth_writing(
    before: State | None, after: State, now: datetime, written_at: datetime | None, *, settled: bool
) -> bool:
    """Tells whether a state is to be written: steps at once, what merely moves on now and then."""
    if before is None or written_at is None:
        return True
    if after.desired != before.desired or after.floor != before.floor:
        return True
    if settled and after.reason != before.reason and now - written_at >= REASON_PERSIST:
        return True
    return (
        after.active_time - before.active_time >= PERSIST
        or after.waiting_time - before.waiting_time >= PERSIST
    )


def _of_deployments(
    view: View, targets: Mapping[str, object]
) -> tuple[
    dict[str, list[replica_pb2.ReplicaAssignment]], dict[str, dict[str, replica_pb2.ReplicaObservation]]
]:
    """Assignments and observations of some deployments."""
    assignments: dict[str, list[replica_pb2.ReplicaAssignment]] = {}
    observations: dict[str, dict[str, replica_pb2.ReplicaObservation]] = {}
    for key, assignment in view.assignments.items():
        name, _, replica = key.removeprefix(keys.PLAN_REPLICAS).rpartition("/")
        if name not in targets:
            continue
        assignments.setdefault(name, []).append(assignment)
        observed = view.observations.get(f"{keys.ACTUAL_REPLICAS}{name}/{replica}")
        if observed is not None:
            observations.setdefault(name, {})[replica] = observed
    return assignments, observations
