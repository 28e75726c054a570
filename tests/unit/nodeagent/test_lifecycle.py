"""The life of a replica, step by step: fake runtime, scripted probe, time that the test owns."""

from datetime import timedelta
from pathlib import Path
from typing import cast

import pytest
from millrace.core.v1 import replica_pb2, stats_pb2, types_pb2

from core.clock import to_timestamp
from core.states import ReplicaState
from nodeagent.engines.base import EngineAdapter
from nodeagent.engines.external import ExternalAdapter
from nodeagent.health import EngineProbe, Outcome
from nodeagent.inventory import Inventory
from nodeagent.journal import Journal
from nodeagent.lifecycle import Lifecycle, LifecycleLimits
from nodeagent.replica import Replica, new_replica
from nodeagent.runtimes.ports import PortAllocator
from tests.support.agent_parts import BAD, GOOD, FakeAdapter, FakeDevices, FakeProbe, FakeProcess, FakeRuntime
from tests.support.clock import ManualClock
from tests.support.fleet import simulator_assignment


class Stage:
    """Everything around one replica."""

    def __init__(self, folder: Path) -> None:
        self.clock = ManualClock()
        self.runtime, self.probe, self.adapter = FakeRuntime(), FakeProbe(), FakeAdapter()
        self.devices = FakeDevices()
        self.reported: list[tuple[ReplicaState, bool]] = []
        self.events: list[str] = []
        self.started: list[float] = []
        self.folder = folder
        adapters: dict[int, EngineAdapter] = {
            int(types_pb2.ENGINE_SIMULATOR): self.adapter,
            int(types_pb2.ENGINE_EXTERNAL): ExternalAdapter(),
        }
        self.lifecycle = Lifecycle(
            node="node-1",
            host="127.0.0.1",
            labels={"MILLRACE_NODE": "node-1"},
            clock=self.clock,
            adapters=adapters,
            runtime=self.runtime,
            inventory=Inventory(
                node="node-1",
                advertise_host="127.0.0.1",
                labels={},
                sources=[self.devices],
                adapters=adapters,
                clock=self.clock,
            ),
            ports=PortAllocator(25000, 25999, "127.0.0.1"),
            probe=cast("EngineProbe", self.probe),
            journal=Journal(folder / "journal"),
            observer=self,
            limits=LifecycleLimits(start_timeout=100.0),
        )
        self.replica = self.new(simulator_assignment("chat-a"))

    def new(self, assignment: replica_pb2.ReplicaAssignment) -> Replica:
        self.replica = new_replica(
            assignment, node="node-1", log_path=self.folder / "chat-a.log", clock=self.clock
        )
        return self.replica

    def replica_changed(self, replica: Replica) -> None:
        self.reported.append((replica.state, replica.observation.healthy))

    def replica_event(self, replica: Replica, reason: str, message: str, *, warning: bool = False) -> None:
        self.events.append(reason)

    def replica_started(self, replica: Replica, seconds: float) -> None:
        self.started.append(seconds)

    @property
    def process(self) -> FakeProcess:
        return self.runtime.processes[-1]

    def state(self) -> ReplicaState:
        return self.replica.state

    async def step(self) -> float | None:
        self.replica.wake.clear()
        return await self.lifecycle.step(self.replica)

    async def pass_time(self, seconds: float) -> float | None:
        """Steps at the times that the steps ask for, until so much time has passed."""
        end = self.clock.monotonic() + seconds
        while True:
            wait = await self.step()
            if wait is not None and self.replica.wake.is_set():
                continue
            if wait is None or self.clock.monotonic() + max(wait, 0.001) > end:
                await self.clock.advance(max(0.0, end - self.clock.monotonic()))
                return wait
            await self.clock.advance(max(wait, 0.001))

    async def bring_up(self) -> None:
        for _ in range(3):
            await self.step()
        assert self.state() == ReplicaState.READY, self.replica.observation

    def order_drain(self, deadline_seconds: float | None = 30.0) -> None:
        order = replica_pb2.ReplicaAssignment()
        order.CopyFrom(self.replica.assignment)
        order.desired_state = types_pb2.REPLICA_STATE_DRAINING
        if deadline_seconds is not None:
            deadline = self.clock.now() + timedelta(seconds=deadline_seconds)
            order.drain_deadline_time.CopyFrom(to_timestamp(deadline))
        assert self.replica.obey(order)


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    return Stage(tmp_path)


async def test_each_step_goes_one_state_forward(stage: Stage) -> None:
    assert await stage.step() == 0
    assert stage.state() == ReplicaState.PREPARING
    assert await stage.step() == 0
    assert stage.state() == ReplicaState.STARTING
    assert stage.replica.observation.pid == 4242
    assert stage.replica.observation.url == f"http://127.0.0.1:{stage.replica.port}"
    assert stage.runtime.labels[0]["MILLRACE_REPLICA"] == "chat-a"
    assert stage.runtime.labels[0]["MILLRACE_INCARNATION"] == stage.replica.observation.incarnation
    assert await stage.step() == 2
    assert stage.reported == [
        (ReplicaState.PREPARING, False),
        (ReplicaState.STARTING, False),
        (ReplicaState.READY, True),
    ]
    assert stage.replica.observation.engine_version == "9.9"
    assert stage.replica.observation.facts.max_model_len == 2048
    assert not stage.replica.observation.facts.HasField("kv_cache_tokens")
    assert len(stage.started) == 1


async def test_readiness_is_asked_often_at_first_and_needs_a_served_token(stage: Stage) -> None:
    stage.probe.alive = BAD
    await stage.step()
    await stage.step()
    waits = [await stage.step() for _ in range(30)]
    assert waits[0] is not None
    assert waits[0] < 0.02
    assert waits == sorted(waits, key=lambda wait: wait or 0)
    assert waits[-1] == 0.25
    stage.probe.alive, stage.probe.served = GOOD, BAD
    await stage.step()
    assert stage.state() == ReplicaState.STARTING
    stage.probe.served = GOOD
    await stage.step()
    assert stage.state() == ReplicaState.READY


async def test_never_ready_is_killed_at_the_deadline(stage: Stage) -> None:
    stage.probe.alive = BAD
    stage.replica.log_path.write_text("loading\nstill loading\n")
    await stage.pass_time(101)
    assert stage.process.signals == ["KILL"]
    stage.process.end("killed by signal SIGKILL")
    assert await stage.step() is None
    assert stage.state() == ReplicaState.FAILED
    assert "did not become ready in 100 s; last: no answer" in stage.replica.observation.message
    assert list(stage.replica.observation.log_tail) == ["loading", "still loading"]


async def test_missing_environment_fails_with_the_remedy(stage: Stage) -> None:
    stage.adapter.refusal = "not installed: run make up"
    await stage.step()
    assert await stage.step() is None
    assert stage.state() == ReplicaState.FAILED
    assert stage.replica.observation.message == "not installed: run make up"
    assert not stage.runtime.commands


async def test_unknown_device_and_engine_are_failures(stage: Stage) -> None:
    assignment = simulator_assignment("chat-a")
    assignment.devices[0].device_id = "GPU-9"
    stage.new(assignment)
    await stage.step()
    await stage.step()
    assert "device GPU-9 is not on node node-1; it has: cpu" in stage.replica.observation.message
    assignment = simulator_assignment("chat-b")
    assignment.launch.engine = types_pb2.ENGINE_OLLAMA
    stage.new(assignment)
    await stage.step()
    await stage.step()
    assert "no adapter for ENGINE_OLLAMA" in stage.replica.observation.message


async def test_start_waits_for_memory_and_then_gives_up(stage: Stage) -> None:
    stage.devices.free = 1
    await stage.step()
    assert await stage.step() == 1
    assert "waiting for memory" in stage.replica.observation.message
    stage.devices.free = 2**30
    assert await stage.step() == 0
    assert stage.state() == ReplicaState.STARTING
    stage.new(simulator_assignment("chat-b"))
    stage.devices.free = 1
    await stage.pass_time(70)
    assert stage.state() == ReplicaState.FAILED
    assert "waited 60 s" in stage.replica.observation.message


async def test_end_of_the_engine_is_a_failure_with_its_last_lines(stage: Stage) -> None:
    await stage.bring_up()
    stage.replica.log_path.write_text("\n".join(f"line {n}" for n in range(100)))
    stage.process.end("exit code 3")
    assert stage.replica.wake.is_set()
    assert await stage.step() is None
    assert stage.state() == ReplicaState.FAILED
    assert "exit code 3" in stage.replica.observation.message
    assert list(stage.replica.observation.log_tail) == [f"line {n}" for n in range(70, 100)]
    assert not stage.replica.observation.healthy


async def test_three_failures_make_unhealthy_and_a_served_token_heals(stage: Stage) -> None:
    await stage.bring_up()
    stage.probe.alive = BAD
    for _ in range(2):
        await stage.step()
        assert stage.replica.observation.healthy
    await stage.step()
    assert not stage.replica.observation.healthy
    assert stage.events == ["EngineUnhealthy"]
    stage.probe.alive, stage.probe.served = GOOD, BAD
    await stage.step()
    assert not stage.replica.observation.healthy
    stage.probe.served = GOOD
    await stage.step()
    assert stage.replica.observation.healthy
    assert stage.events == ["EngineUnhealthy", "EngineRecovered"]
    assert stage.state() == ReplicaState.READY


async def test_unhealthy_for_a_minute_is_killed(stage: Stage) -> None:
    await stage.bring_up()
    stage.probe.alive = BAD
    await stage.pass_time(70)
    assert "KILL" in stage.process.signals
    stage.process.end("killed")
    await stage.step()
    assert stage.state() == ReplicaState.FAILED
    assert "not well for" in stage.replica.observation.message


async def test_idle_engine_gets_a_canary_each_minute_and_a_busy_one_none(stage: Stage) -> None:
    await stage.bring_up()
    assert stage.probe.canaries == 1
    await stage.pass_time(130)
    assert stage.probe.canaries == 1, "stale metrics keep the canary from being the judge"
    stage.new(simulator_assignment("chat-b"))
    stage.probe.canaries = 0
    stage.probe.page = ""
    await stage.bring_up()
    stage.replica.samples.latest_at = None
    await stage.pass_time(130)
    assert stage.probe.canaries == 3
    for turn in range(70):
        sample = stats_pb2.EngineStats(generation_tokens_total=turn + 1)
        stage.replica.take_sample(sample, stage.clock)
        await stage.step()
        await stage.clock.advance(2)
    assert stage.probe.canaries == 3


async def test_stale_metrics_are_a_failure(stage: Stage) -> None:
    await stage.bring_up()
    await stage.pass_time(20)
    assert not stage.replica.observation.healthy
    assert "metrics are" in stage.replica.observation.message


async def test_drain_waits_for_requests_then_stops(stage: Stage) -> None:
    await stage.bring_up()
    stage.probe.page = 'vllm:num_requests_running{engine="0"} 1\nvllm:num_requests_waiting{engine="0"} 0\n'
    stage.order_drain()
    assert stage.replica.wake.is_set()
    assert await stage.step() == 1
    assert stage.state() == ReplicaState.DRAINING
    await stage.pass_time(10)
    assert stage.state() == ReplicaState.DRAINING
    assert not stage.process.signals
    stage.probe.page = 'vllm:num_requests_running{engine="0"} 0\nvllm:num_requests_waiting{engine="0"} 0\n'
    await stage.pass_time(1)
    assert stage.state() == ReplicaState.STOPPED
    assert stage.replica.observation.message == "drained"
    assert stage.process.signals == ["TERM", "released"]


@pytest.mark.parametrize("deadline_seconds", [5.0, None])
async def test_drain_ends_at_its_deadline_when_load_is_unknown(
    stage: Stage, deadline_seconds: float | None
) -> None:
    await stage.bring_up()
    stage.probe.page = ""
    stage.order_drain(deadline_seconds)
    await stage.pass_time((deadline_seconds or 30.0) - 0.5)
    assert stage.state() == ReplicaState.DRAINING
    await stage.pass_time(2)
    assert stage.state() == ReplicaState.STOPPED
    assert "deadline" in stage.replica.observation.message


async def test_drain_before_ready_stops_at_once(stage: Stage) -> None:
    stage.order_drain()
    assert await stage.step() is None
    assert stage.state() == ReplicaState.STOPPED
    assert not stage.runtime.commands


async def test_a_replica_that_makes_room_for_another_says_so(stage: Stage) -> None:
    await stage.bring_up()
    stage.replica.assignment.preempted_by = "team/urgent"
    stage.order_drain()
    await stage.pass_time(60)
    assert stage.state() == ReplicaState.PREEMPTED


async def test_removed_replica_is_terminated_then_killed(stage: Stage) -> None:
    await stage.bring_up()
    stage.process.obedient = False
    stage.replica.removed = True
    await stage.pass_time(9)
    assert stage.process.signals == ["TERM"]
    await stage.pass_time(2)
    assert stage.process.signals[:2] == ["TERM", "KILL"]
    stage.process.end("killed by signal SIGKILL")
    assert await stage.step() is None
    assert stage.state() == ReplicaState.STOPPED


async def test_process_that_cannot_be_killed_is_given_up(stage: Stage) -> None:
    await stage.bring_up()
    stage.process.obedient = False
    stage.replica.removed = True
    await stage.pass_time(60)
    assert stage.state() == ReplicaState.FAILED
    assert "does not end even when killed" in stage.replica.observation.message


async def test_external_url_waits_for_ever_and_is_never_killed(stage: Stage) -> None:
    assignment = simulator_assignment("ext-a")
    assignment.launch.engine = types_pb2.ENGINE_EXTERNAL
    assignment.launch.external_url = "http://10.0.0.5:8000/v1/"
    del assignment.devices[:]
    stage.new(assignment)
    stage.probe.alive = BAD
    await stage.pass_time(1000)
    assert stage.state() == ReplicaState.STARTING
    assert stage.replica.observation.url == "http://10.0.0.5:8000"
    assert stage.replica.observation.message == "waiting for http://10.0.0.5:8000: no answer"
    stage.probe.alive = Outcome(ok=False, reason="404", absent=True)
    await stage.pass_time(3)
    assert stage.state() == ReplicaState.READY
    stage.probe.models = BAD
    await stage.pass_time(300)
    assert stage.state() == ReplicaState.READY
    assert not stage.replica.observation.healthy
    stage.order_drain()
    await stage.pass_time(3)
    assert stage.state() == ReplicaState.STOPPED
    assert not stage.runtime.processes


async def test_order_of_an_earlier_leader_is_not_obeyed(stage: Stage) -> None:
    order = simulator_assignment("chat-a", fencing_token=0)
    order.desired_state = types_pb2.REPLICA_STATE_DRAINING
    assert not stage.replica.obey(order)
    assert stage.replica.assignment.desired_state == types_pb2.REPLICA_STATE_READY
    assert not stage.replica.wake.is_set()


async def test_a_state_never_goes_back(stage: Stage) -> None:
    await stage.bring_up()
    with pytest.raises(AssertionError, match="cannot go from READY to STARTING"):
        stage.replica.advance(ReplicaState.STARTING, clock=stage.clock)
