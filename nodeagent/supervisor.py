"""Runs every replica of this node: one worker each, in step with the assignments.

In: complete sets of assignments and changes, and the journal at the start. Out: workers that step their
replicas, and reports. Workers of different replicas run side by side; steps of one never overlap. Loss of
the control plane is no input here: engines go on.
"""

import asyncio
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from datetime import datetime
from pathlib import Path

import structlog
from millrace.core.v1 import replica_pb2
from millrace.fleet.v1 import fleet_service_pb2

from core import errors
from core.backoff import Backoff, BackoffPolicy
from core.clock import Clock, to_timestamp
from core.states import ReplicaState
from core.tasks import cancel_and_wait
from nodeagent import logs
from nodeagent.journal import Journal, JournalEntry, is_replica_name
from nodeagent.lifecycle import Lifecycle, process_labels
from nodeagent.replica import Ending, Replica, new_replica, replica_from_journal
from nodeagent.reporting import Reporter
from nodeagent.runtimes.base import Runtime

_log = structlog.get_logger(__name__)

# A step that fails for reasons of the machine (disk, processes) is tried again.
STEP_BACKOFF = BackoffPolicy(initial_seconds=0.2, maximum_seconds=5.0)
# After so many failures in a row the replica is given up, so that it is placed elsewhere.
STEP_FAILURES_MAX = 10
# An engine that nobody owns holds memory of devices that are given to others; looking takes milliseconds.
ORPHAN_PERIOD_SECONDS = 15.0


class Supervisor:
    """All replicas of this node."""

    def __init__(
        self,
        *,
        node: str,
        log_directory: Path,
        clock: Clock,
        journal: Journal,
        runtime: Runtime,
        reporter: Reporter,
        labels: Mapping[str, str],
    ) -> None:
        """Takes its parts; `attach` gives it the life cycle, which reports back to it."""
        self._node = node
        self._log_directory = log_directory
        self._clock = clock
        self._journal = journal
        self._runtime = runtime
        self._reporter = reporter
        self._labels = dict(labels)
        self._replicas: dict[str, Replica] = {}
        self._workers: dict[str, asyncio.Task[None]] = {}
        self._lifecycle: Lifecycle | None = None
        self._stopping = False
        self.on_started: Callable[[float], None] = lambda _: None

    def attach(self, lifecycle: Lifecycle) -> None:
        """Gives the life cycle."""
        self._lifecycle = lifecycle

    @property
    def replicas(self) -> Mapping[str, Replica]:
        """Replicas by id."""
        return self._replicas

    def observations(self) -> list[replica_pb2.ReplicaObservation]:
        """Returns copies of all observations."""
        copies = []
        for replica in self._replicas.values():
            copy = replica_pb2.ReplicaObservation()
            copy.CopyFrom(replica.observation)
            copies.append(copy)
        return copies

    # --- observer of the life cycle -----------------------------------------------------------------

    def replica_changed(self, replica: Replica) -> None:
        """Reports a change."""
        observation = replica.observation
        _log.info(
            "replica changed",
            replica=replica.name,
            namespace=observation.namespace,
            deployment=observation.deployment,
            state=replica.state.name,
            healthy=observation.healthy,
            detail=observation.message,
        )
        self._reporter.put(observation)

    def replica_event(self, replica: Replica, reason: str, message: str, *, warning: bool = False) -> None:
        """Reports an event."""
        _log.log(30 if warning else 20, message, replica=replica.name, reason=reason)
        self._reporter.put_event(
            fleet_service_pb2.AgentEvent(
                time=to_timestamp(self._clock.now()),
                replica=replica.name,
                namespace=replica.observation.namespace,
                deployment=replica.observation.deployment,
                warning=warning,
                reason=reason,
                message=message[:1024],
            )
        )

    def replica_started(self, replica: Replica, seconds: float) -> None:
        """Notes how long an engine took from its start to its first token."""
        _log.info("engine started", replica=replica.name, start_seconds=round(seconds, 3))
        self.on_started(seconds)

    # --- start and end ------------------------------------------------------------------------------

    async def adopt(self) -> None:
        """Takes over what an earlier agent left: engines that run go on, those that are gone have failed.

        Raises:
            Unavailable: The journal cannot be used.
        """
        for entry in await self._journal.load():
            await self._adopt(entry)
        await self._collect_orphans()

    async def collect_orphans(self) -> None:
        """Kills engines of ours that nobody owns, again and again: whatever escaped their end."""
        while True:
            await self._clock.sleep(ORPHAN_PERIOD_SECONDS)
            await self._collect_orphans()

    async def _collect_orphans(self) -> None:
        killed = await self._runtime.sweep_unknown(self._labels, self._is_owned)
        if killed:
            _log.warning("killed engines that no replica owns", processes=killed)

    def _is_owned(self, session: int, incarnation: str) -> bool:
        """Tells whether an engine belongs to a replica; one that is being started has its incarnation."""
        return any(
            (replica.process is not None and replica.process.identity.pid == session)
            or (not replica.state.terminal and replica.observation.incarnation == incarnation != "")
            for replica in self._replicas.values()
        )

    async def close(self) -> None:
        """Ends the workers and lets engines run on."""
        await cancel_and_wait(*self._workers.values())
        for replica in self._replicas.values():
            if replica.process is not None:
                replica.process.release()
                replica.process = None

    async def stop_all(self) -> None:
        """Stops every engine and waits until it is gone; the replicas are remembered as stopped."""
        # The control plane may replace what stops, and this node is the wrong place for that.
        self._stopping = True
        for replica in self._replicas.values():
            replica.halted = True
            replica.wake.set()
        while self._workers:
            await asyncio.wait(list(self._workers.values()))

    # --- assignments --------------------------------------------------------------------------------

    async def apply_complete(
        self, assignments: Iterable[replica_pb2.ReplicaAssignment], *, sent_at: datetime | None = None
    ) -> None:
        """Takes a complete set: whatever is not in it is stopped and forgotten."""
        assigned = {assignment.replica: assignment for assignment in assignments}
        gone = [name for name in self._replicas if name not in assigned]
        await self.apply_change(assigned.values(), gone, sent_at=sent_at)

    async def apply_change(
        self,
        assigned: Iterable[replica_pb2.ReplicaAssignment],
        removed: Iterable[str],
        *,
        sent_at: datetime | None = None,
    ) -> None:
        """Takes a change, sent at a time of the control plane's clock."""
        for name in removed:
            replica = self._replicas.get(name)
            if replica is not None:
                await self._remove(replica)
        for assignment in assigned:
            self._assign(assignment)
            replica = self._replicas.get(assignment.replica)
            if replica is not None:
                replica.note_drain_deadline(self._clock, sent_at)

    def _assign(self, assignment: replica_pb2.ReplicaAssignment) -> None:
        known = self._replicas.get(assignment.replica)
        if known is not None:
            if not known.obey(assignment):
                _log.warning(
                    "an order of an earlier leader is ignored",
                    replica=known.name,
                    fencing_token=assignment.fencing_token,
                    obeyed_fencing_token=known.assignment.fencing_token,
                )
            return
        if self._stopping:
            _log.info("a new assignment is left to the next agent", replica=assignment.replica)
            return
        if not is_replica_name(assignment.replica):
            _log.error(
                "an assignment without a usable replica id is ignored", replica=assignment.replica[:80]
            )
            return
        replica = new_replica(
            assignment,
            node=self._node,
            log_path=logs.log_path(self._log_directory, assignment.replica),
            clock=self._clock,
        )
        self._replicas[replica.name] = replica
        self._reporter.put(replica.observation)
        self._begin(replica)

    async def _remove(self, replica: Replica) -> None:
        replica.removed = True
        replica.wake.set()
        worker = self._workers.get(replica.name)
        if worker is None or worker.done():
            await self._forget(replica)

    # --- workers ------------------------------------------------------------------------------------

    def _begin(self, replica: Replica) -> None:
        task = asyncio.create_task(self._work(replica), name=f"replica-{replica.name}")
        self._workers[replica.name] = task
        task.add_done_callback(lambda _: self._workers.pop(replica.name, None))

    async def _work(self, replica: Replica) -> None:
        assert self._lifecycle is not None
        backoff = Backoff(STEP_BACKOFF)
        while True:
            replica.wake.clear()
            try:
                wait_seconds = await self._lifecycle.step(replica)
                backoff.succeeded()
            except Exception as error:  # noqa: BLE001 - one replica's trouble must not end the others
                _log.error("a step failed", replica=replica.name, exc_info=error)
                wait_seconds = backoff.failed()
                if backoff.failures >= STEP_FAILURES_MAX and replica.ending is None:
                    now = self._clock.monotonic()
                    message = f"the agent cannot run it: {error}"
                    replica.ending = Ending(ReplicaState.FAILED, message, now, now + 30.0)
            if wait_seconds is None:
                break
            if wait_seconds > 0:
                with suppress(TimeoutError):
                    async with asyncio.timeout(wait_seconds):
                        await replica.wake.wait()
        if replica.removed:
            await self._forget(replica)

    async def _forget(self, replica: Replica) -> None:
        """Forgets a replica whose last report is on its way."""
        self._replicas.pop(replica.name, None)
        try:
            await self._journal.forget(replica.name)
            await asyncio.to_thread(logs.prune, self._log_directory, list(self._replicas))
        except (errors.Unavailable, OSError) as error:
            _log.error("a replica cannot be forgotten on disk", replica=replica.name, error=str(error))

    async def _adopt(self, entry: JournalEntry) -> None:
        assert self._lifecycle is not None
        name = entry.observation.replica
        replica = replica_from_journal(
            entry, log_path=logs.log_path(self._log_directory, name), clock=self._clock
        )
        self._replicas[name] = replica
        if replica.state.terminal:
            return
        if entry.process is not None:
            replica.process = await self._runtime.adopt(
                entry.process, labels=process_labels(replica, self._labels), on_exit=replica.wake.set
            )
            if replica.process is None:
                await self._lost_meanwhile(replica, entry)
                return
            self._lifecycle.ports.reserve(replica.port)
            text = f"adopted; process {entry.process.pid} ran on without an agent"
            self.replica_event(replica, "EngineAdopted", text)
        elif not replica.external:
            await self._lost_meanwhile(replica, entry)
            return
        self._begin(replica)

    async def _lost_meanwhile(self, replica: Replica, entry: JournalEntry) -> None:
        if entry.process is not None:
            await self._runtime.sweep(entry.process)
        message = "the engine ended while no agent watched it"
        ended = replica.state == ReplicaState.DRAINING
        tail = await asyncio.to_thread(logs.last_lines, replica.log_path, 30)
        replica.observation.pid = 0
        replica.advance(
            ReplicaState.STOPPED if ended else ReplicaState.FAILED,
            clock=self._clock,
            message=message,
            log_tail=[] if ended else tail,
        )
        self._reporter.put(replica.observation)
        with suppress(errors.Unavailable):
            # The same is concluded again after the next start.
            await self._journal.save(replica.entry())
