"""The life of a replica, one step a call.

In: a replica. Out: how long to wait before the next step, or None once it has ended. A step looks at the
present state and does at most one thing: it never sleeps, and whatever takes long (a probe) is given up
when the replica is woken. Steps of one replica never overlap; the supervisor sees to that.

    ASSIGNED -> PREPARING -> STARTING -> READY -> DRAINING -> STOPPED
                   any of them -> STOPPED (removed) or FAILED (ended by itself, never ready, not well)
"""

import asyncio
import secrets
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import structlog
from millrace.core.v1 import types_pb2

from core import errors
from core.clock import Clock, to_timestamp
from core.states import ReplicaState
from core.tasks import cancel_and_wait
from nodeagent import health
from nodeagent.engines.base import CannotStart, EngineAdapter
from nodeagent.engines.external import base_url
from nodeagent.engines.registry import EngineAdapters
from nodeagent.health import EngineProbe, Outcome, apply_facts
from nodeagent.inventory import Inventory
from nodeagent.journal import Journal
from nodeagent.logs import last_lines
from nodeagent.replica import LOG_TAIL_LINES, Ending, Replica
from nodeagent.runtimes.base import LABEL_INCARNATION, LABEL_REPLICA, Runtime
from nodeagent.runtimes.ports import PortAllocator

_log = structlog.get_logger(__name__)
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class LifecycleLimits:
    """Every wait of a replica's life, with its reason. All in seconds.

    Attributes:
        start_timeout: From start to the first token. Large models load for minutes.
        memory_wait: How long a start waits for memory that an ending engine still holds.
        probe_first: Wait after the first readiness probe; a simulated engine is there at once.
        probe_longest: Longest wait between readiness probes; real engines need tens of seconds.
        external_probe: Wait between probes of a URL that does not answer; it is someone else's.
        health_period: Between health checks.
        canary_idle: Without any progress for so long, a canary tells an idle engine from a stuck one.
        metrics_stale: Metrics that were read before and are older than this count as a failure.
        unhealthy_until_failed: An engine that is not well for so long is killed and replaced.
        drain_pause: Routers learn of the draining before the agent looks whether it is idle.
        drain_poll: Between looks while draining.
        drain_default: Drain deadline where the order has none.
        stop_grace: From SIGTERM to SIGKILL.
        kill_grace: From SIGKILL until the end is reported although the process remains.
    """

    start_timeout: float = 600.0
    memory_wait: float = 60.0
    probe_first: float = 0.01
    probe_longest: float = 0.25
    external_probe: float = 2.0
    health_period: float = 2.0
    canary_idle: float = 60.0
    metrics_stale: float = 10.0
    unhealthy_until_failed: float = 60.0
    drain_pause: float = 1.0
    drain_poll: float = 0.1
    drain_default: float = 30.0
    stop_grace: float = 10.0
    kill_grace: float = 30.0


# One idle look could fall between two requests' engine steps; gauges lag by a step.
IDLE_SAMPLES_UNTIL_DRAINED = 2
_PROBE_GROWTH = 1.2
# vLLM writes a few hundred lines for each worker until it serves; what a start took stands among the last.
START_LOG_LINES = 5000
# Someone else's URL may be a moment late; after this many probes a person should know.
EXTERNAL_PROBES_UNTIL_WARNING = 3


class Observer(Protocol):
    """Who is told what happens to replicas."""

    def replica_changed(self, replica: Replica) -> None:
        """The observation changed and is to be reported."""
        ...

    def replica_started(self, replica: Replica, seconds: float) -> None:
        """An engine served its first token so long after its start."""
        ...

    def replica_event(self, replica: Replica, reason: str, message: str, *, warning: bool = False) -> None:
        """Something happened that belongs into the event log."""
        ...


@dataclass(frozen=True, slots=True)
class Lifecycle:
    """Moves replicas on.

    Attributes:
        node: Name of this node.
        host: Address that engines listen on and are reached at.
        labels: Variables that mark engines of this agent.
        clock: Time.
        adapters: Engine to adapter.
        runtime: Runs engines.
        inventory: Devices and their free memory.
        ports: Ports for engines.
        probe: Asks engines over HTTP.
        journal: Memory across restarts.
        observer: Who is told.
        limits: Every wait.
    """

    node: str
    host: str
    labels: Mapping[str, str]
    clock: Clock
    adapters: EngineAdapters
    runtime: Runtime
    inventory: Inventory
    ports: PortAllocator
    probe: EngineProbe
    journal: Journal
    observer: Observer
    limits: LifecycleLimits = LifecycleLimits()

    async def step(self, replica: Replica) -> float | None:
        """Moves a replica on by one step.

        Returns:
            Seconds until the next step is due; None once the replica has ended.
        """
        if replica.state.terminal:
            return None
        if replica.process is not None and replica.process.exited:
            return await self._ended(replica)
        if replica.ending is None:
            self._decide_end(replica)
        if replica.ending is not None:
            return await self._end(replica, replica.ending)
        if replica.state == ReplicaState.READY and _wants_drain(replica):
            return await self._begin_drain(replica)
        steps: Mapping[ReplicaState, Callable[[Replica], Awaitable[float | None]]] = {
            ReplicaState.ASSIGNED: self._take_up,
            ReplicaState.PREPARING: self._prepare,
            ReplicaState.STARTING: self._await_ready,
            ReplicaState.READY: self._supervise,
            ReplicaState.DRAINING: self._drain,
        }
        return await steps[replica.state](replica)

    # --- up ---------------------------------------------------------------------------------------

    async def _take_up(self, replica: Replica) -> float:
        replica.advance(ReplicaState.PREPARING, clock=self.clock, message="checking what the engine needs")
        self.observer.replica_changed(replica)
        return 0.0

    async def _prepare(self, replica: Replica) -> float | None:
        launch = replica.assignment.launch
        try:
            adapter = self._adapter(replica)
            devices = await asyncio.to_thread(self.inventory.claimed, replica.assignment.devices)
            await asyncio.to_thread(adapter.check, launch, devices)
            shortage = await asyncio.to_thread(self.inventory.shortage, devices)
            if shortage is not None:
                waited = self.clock.monotonic() - replica.state_since
                if waited >= self.limits.memory_wait:
                    raise CannotStart(f"{shortage}; waited {waited:.0f} s")
                self._say(replica, f"waiting for memory: {shortage}")
                return 1.0
            if replica.external:
                replica.observation.url = base_url(launch.external_url)
            else:
                replica.port = self.ports.allocate()
                host = f"[{self.host}]" if ":" in self.host else self.host
                replica.observation.url = f"http://{host}:{replica.port}"
            replica.observation.incarnation = secrets.token_hex(8)
            command = adapter.command(launch, host=self.host, port=replica.port, devices=devices)
            if command is not None:
                replica.process = await self.runtime.start(
                    command,
                    labels=process_labels(replica, self.labels),
                    log_path=replica.log_path,
                    on_exit=replica.wake.set,
                )
                replica.observation.pid = replica.process.identity.pid
        except CannotStart as error:
            await self._finish(replica, ReplicaState.FAILED, error.message)
            return None
        replica.observation.start_time.CopyFrom(to_timestamp(self.clock.now()))
        await self._advance(replica, ReplicaState.STARTING, "waiting for the engine's first token")
        return 0.0

    async def _await_ready(self, replica: Replica) -> float | None:
        url, model = replica.observation.url, replica.observation.served_model_name
        waited = self.clock.monotonic() - replica.state_since
        if not replica.external and waited >= self.limits.start_timeout:
            message = f"did not become ready in {self.limits.start_timeout:.0f} s"
            return self._fail(replica, f"{message}; last: {replica.observation.message}")
        left = max(1.0, self.limits.start_timeout - waited)
        outcome = await self._unless_woken(replica, self._liveness(replica))
        if outcome is not None and outcome.ok:
            limit = min(health.FIRST_CANARY_TIMEOUT_SECONDS, left)
            outcome = await self._unless_woken(replica, self.probe.canary(url, model, timeout_seconds=limit))
        if outcome is None:
            return 0.0
        if not outcome.ok:
            replica.probes += 1
            if replica.external:
                message = f"waiting for {url}: {outcome.reason}"
                self._say(replica, message)
                if replica.probes == EXTERNAL_PROBES_UNTIL_WARNING:
                    self.observer.replica_event(replica, "ExternalUnreachable", message, warning=True)
                return self.limits.external_probe
            replica.observation.message = outcome.reason[:1024]
            wait = self.limits.probe_first * _PROBE_GROWTH ** min(replica.probes, 64)
            return min(self.limits.probe_longest, wait)
        await self._unless_woken(replica, self._learn_facts(replica))
        replica.canary_at = self.clock.monotonic()
        replica.observation.ready_time.CopyFrom(to_timestamp(self.clock.now()))
        took = self.clock.monotonic() - replica.state_since
        message = f"served its first token {took * 1000:.0f} ms after its start"
        await self._advance(replica, ReplicaState.READY, message)
        self.observer.replica_started(replica, took)
        return self.limits.health_period

    async def _learn_facts(self, replica: Replica) -> None:
        url, model = replica.observation.url, replica.observation.served_model_name
        facts, (outcome, page) = await asyncio.gather(self.probe.facts(url, model), self.probe.metrics(url))
        apply_facts(replica.observation, facts)
        if not outcome.ok:
            return
        stats = self._adapter(replica).parse_metrics(page)
        if stats.HasField("kv_cache_tokens"):
            replica.observation.facts.kv_cache_tokens = stats.kv_cache_tokens
        if stats.HasField("kv_block_tokens"):
            replica.observation.facts.kv_block_tokens = stats.kv_block_tokens
        if replica.process is not None:
            await asyncio.to_thread(self._learn_memory, replica, page)
        replica.take_sample(stats, self.clock)

    def _learn_memory(self, replica: Replica, page: str) -> None:
        """Learns what the start took; read once, when the engine has just served its first token."""
        assert replica.process is not None
        launch = replica.assignment.launch
        log = "\n".join(last_lines(replica.log_path, START_LOG_LINES))
        facts = self._adapter(replica).parse_start(log, page, launch)
        replica.observation.facts.MergeFrom(facts)
        resident = replica.process.memory_bytes()
        if resident is not None:
            replica.observation.facts.resident_bytes = resident

    # --- steady -----------------------------------------------------------------------------------

    async def _supervise(self, replica: Replica) -> float | None:
        outcome = await self._unless_woken(replica, self._check(replica))
        if outcome is None:
            return 0.0
        now = self.clock.monotonic()
        if outcome.ok:
            if replica.health.succeeded():
                await self._set_healthy(replica, healthy=True, message="serves again")
            return self.limits.health_period
        if replica.health.failed(now):
            await self._set_healthy(replica, healthy=False, message=f"not well: {outcome.reason}")
        since = replica.health.unhealthy_since
        ill_seconds = now - since if since is not None else 0.0
        if not replica.external and ill_seconds >= self.limits.unhealthy_until_failed:
            return self._fail(replica, f"not well for {ill_seconds:.0f} s: {outcome.reason}")
        return self.limits.health_period

    async def _check(self, replica: Replica) -> Outcome:
        """One health check: alive, metrics fresh, and a served token where nothing else proves one."""
        outcome = await self._liveness(replica)
        if not outcome.ok:
            return outcome
        now, seen_at = self.clock.monotonic(), replica.samples.latest_at
        if seen_at is not None and now - seen_at > self.limits.metrics_stale:
            return Outcome(ok=False, reason=f"its metrics are {now - seen_at:.0f} s old")
        proven_at = max(replica.canary_at or 0.0, replica.samples.progress_at or 0.0, replica.state_since)
        if replica.health.healthy and now - proven_at < self.limits.canary_idle:
            return outcome
        served = await self.probe.canary(
            replica.observation.url,
            replica.observation.served_model_name,
            timeout_seconds=health.CANARY_TIMEOUT_SECONDS,
        )
        if served.ok:
            replica.canary_at = self.clock.monotonic()
        return served

    async def _liveness(self, replica: Replica) -> Outcome:
        outcome = await self.probe.liveness(replica.observation.url)
        if outcome.absent and replica.external:
            # Not every OpenAI-compatible service has /health.
            return await self.probe.served_models(replica.observation.url)
        return outcome

    async def _set_healthy(self, replica: Replica, *, healthy: bool, message: str) -> None:
        replica.observation.healthy = healthy
        replica.observation.message = message[:1024]
        reason = "EngineRecovered" if healthy else "EngineUnhealthy"
        self.observer.replica_event(replica, reason, message, warning=not healthy)
        self.observer.replica_changed(replica)
        await self._remember(replica)

    # --- down -------------------------------------------------------------------------------------

    async def _begin_drain(self, replica: Replica) -> float:
        await self._advance(replica, ReplicaState.DRAINING, "finishing running requests")
        return self.limits.drain_pause

    async def _drain(self, replica: Replica) -> float:
        now = self.clock.monotonic()
        if now - replica.state_since < self.limits.drain_pause:
            return self.limits.drain_pause - (now - replica.state_since)
        if replica.drain_end_at is None:
            replica.note_drain_deadline(self.clock, None)
        end_at = replica.drain_end_at
        if now >= (end_at if end_at is not None else replica.state_since + self.limits.drain_default):
            return self._stop(replica, "stopped at the drain deadline")
        if replica.external:
            return self._stop(replica, "no longer watched")
        result = await self._unless_woken(replica, self.probe.metrics(replica.observation.url))
        if result is None:
            return 0.0
        stats = self._adapter(replica).parse_metrics(result[1])
        known = stats.HasField("running_requests") and stats.HasField("waiting_requests")
        idle = known and stats.running_requests + stats.waiting_requests == 0
        replica.idle_samples = replica.idle_samples + 1 if idle else 0
        if replica.idle_samples >= IDLE_SAMPLES_UNTIL_DRAINED:
            return self._stop(replica, "drained")
        return self.limits.drain_poll

    def _decide_end(self, replica: Replica) -> None:
        if replica.removed:
            self._stop(replica, "no longer assigned")
        elif replica.halted:
            self._stop(replica, "stopped together with its node's agent")
        elif _wants_drain(replica) and replica.state < ReplicaState.READY:
            self._stop(replica, "ended before it served")

    def _stop(self, replica: Replica, message: str) -> float:
        now = self.clock.monotonic()
        kill_at = now + self.limits.stop_grace
        replica.ending = Ending(_ended(replica), message, kill_at, kill_at + self.limits.kill_grace)
        return 0.0

    def _fail(self, replica: Replica, message: str) -> float:
        now = self.clock.monotonic()
        replica.ending = Ending(ReplicaState.FAILED, message, now, now + self.limits.kill_grace)
        return 0.0

    async def _end(self, replica: Replica, ending: Ending) -> float | None:
        process, now = replica.process, self.clock.monotonic()
        if process is None:
            await self._finish(replica, ending.state, ending.message)
            return None
        if now >= ending.give_up_at:
            message = f"{ending.message}; process {process.identity.pid} does not end even when killed"
            await self._finish(replica, ReplicaState.FAILED, message)
            return None
        if now >= ending.kill_at:
            process.kill()
            return 1.0
        if not ending.asked:
            ending.asked = True
            process.terminate()
        return ending.kill_at - now

    async def _ended(self, replica: Replica) -> float | None:
        """The engine's process is gone: by order, or by itself."""
        assert replica.process is not None
        how = replica.process.exit_description
        ending = replica.ending
        if ending is not None:
            await self._finish(replica, ending.state, ending.message)
            return None
        if replica.state == ReplicaState.DRAINING:
            await self._finish(replica, _ended(replica), f"ended while draining: {how}")
            return None
        when = "after it had been ready" if replica.state == ReplicaState.READY else "before it was ready"
        await self._finish(replica, ReplicaState.FAILED, f"the engine ended {when}: {how}")
        return None

    async def _finish(self, replica: Replica, state: ReplicaState, message: str) -> None:
        """Clears up and comes to a last state."""
        process, replica.process = replica.process, None
        if process is not None:
            await self.runtime.sweep(process.identity)
            process.release()
        if replica.port:
            self.ports.release(replica.port)
        tail: list[str] = []
        if state == ReplicaState.FAILED and not replica.external:
            tail = await asyncio.to_thread(last_lines, replica.log_path, LOG_TAIL_LINES)
        await self._advance(replica, state, message, tail)

    # --- shared -----------------------------------------------------------------------------------

    def _adapter(self, replica: Replica) -> EngineAdapter:
        engine = replica.assignment.launch.engine
        adapter = self.adapters.get(engine)
        if adapter is None:
            raise CannotStart(f"this agent has no adapter for {types_pb2.Engine.Name(engine)}")
        return adapter

    def _say(self, replica: Replica, message: str) -> None:
        if replica.observation.message != message[:1024]:
            replica.observation.message = message[:1024]
            self.observer.replica_changed(replica)

    async def _advance(
        self, replica: Replica, state: ReplicaState, message: str, log_tail: list[str] | None = None
    ) -> None:
        replica.advance(state, clock=self.clock, message=message, log_tail=log_tail)
        # The report is on its way while the journal is written.
        self.observer.replica_changed(replica)
        await self._remember(replica)

    async def _remember(self, replica: Replica) -> None:
        try:
            await self.journal.save(replica.entry())
        except errors.Unavailable as error:
            # The engine goes on; an agent that restarts before the next save finds it by its labels.
            _log.error("a replica cannot be remembered", replica=replica.name, error=error.message)

    async def _unless_woken(self, replica: Replica, work: Coroutine[Any, Any, _T]) -> _T | None:
        """Runs a probe until it is done or the replica is woken; None in the latter case."""
        task = asyncio.create_task(work, name=f"probe-{replica.name}")
        waker = asyncio.create_task(replica.wake.wait(), name=f"wake-{replica.name}")
        try:
            await asyncio.wait({task, waker}, return_when=asyncio.FIRST_COMPLETED)
            return task.result() if task.done() else None
        finally:
            await cancel_and_wait(task, waker)


def process_labels(replica: Replica, labels: Mapping[str, str]) -> dict[str, str]:
    """Returns the variables that mark an engine's process as ours."""
    return {
        **labels,
        LABEL_REPLICA: replica.name,
        LABEL_INCARNATION: replica.observation.incarnation,
    }


def _wants_drain(replica: Replica) -> bool:
    return replica.assignment.desired_state >= types_pb2.REPLICA_STATE_DRAINING


def _ended(replica: Replica) -> ReplicaState:
    """State of a replica that ended because it was asked to."""
    return ReplicaState.PREEMPTED if replica.assignment.preempted_by else ReplicaState.STOPPED
