from dataclasses import replace
from datetime import UTC, datetime, timedelta

from controlplane.scheduler import DeploymentView, Failure, Need, Policy, ReplicaView
from controlplane.scheduler.failures import Memory, remember
from core.states import Engine, ReplicaState

NOW = datetime(2030, 1, 1, tzinfo=UTC)
POLICY = Policy()
VIEW = DeploymentView("team/qwen", "uid", 1, 1, 2, Need(Engine.VLLM), observed_generation=1)


def failed(name: str = "qwen-a", *, served_seconds: float | None = None, at: datetime = NOW) -> ReplicaView:
    ready = None if served_seconds is None else at - timedelta(seconds=served_seconds)
    return ReplicaView(
        name,
        "team/qwen",
        "uid",
        1,
        "node-1",
        (),
        draining=False,
        state=ReplicaState.FAILED,
        created=at,
        observed=True,
        state_time=at,
        ready_time=ready,
        message="it crashed",
    )


def serving(since: datetime) -> ReplicaView:
    return replace(
        failed("qwen-b"), state=ReplicaState.READY, created=since, ready_time=since, state_time=since
    )


def after(view: DeploymentView, *gone: ReplicaView, now: datetime = NOW) -> Memory:
    return remember(view, gone, [], now, POLICY)


def wait_seconds(memory: Memory, now: datetime = NOW) -> float | None:
    assert memory.failure is not None
    moment = memory.failure.next_attempt
    return None if moment is None else (moment - now).total_seconds()


def test_starts_that_fail_wait_twice_as_long_each_time_up_to_a_bound() -> None:
    view, now, waits = VIEW, NOW, []
    for _ in range(12):
        memory = after(view, failed(at=now), now=now)
        waits.append(wait_seconds(memory, now))
        assert memory.failure is not None
        view = replace(view, failure=memory.failure)
        assert memory.failure.next_attempt is not None
        now = memory.failure.next_attempt
    assert waits == [1, 2, 4, 8, 16, 32, 64, 128, 256, 300, 300, 300]


def test_replicas_that_fail_together_count_once() -> None:
    memory = after(VIEW, failed("qwen-a"), failed("qwen-b"), failed("qwen-c"))
    assert memory.failure is not None
    assert memory.failure.consecutive == 1
    assert wait_seconds(memory) == 1


def test_a_replica_that_had_served_is_replaced_at_once() -> None:
    memory = after(VIEW, failed(served_seconds=3600))
    assert memory.failure is not None
    assert memory.failure.consecutive == 1
    assert wait_seconds(memory) is None


def test_the_first_crash_soon_after_ready_is_replaced_at_once_and_a_loop_is_slowed() -> None:
    first = after(VIEW, failed(served_seconds=5))
    assert wait_seconds(first) is None
    second = after(replace(VIEW, failure=first.failure), failed(served_seconds=5))
    assert wait_seconds(second) == 1
    later = NOW + timedelta(seconds=2)
    third = after(replace(VIEW, failure=second.failure), failed(served_seconds=1, at=later), now=later)
    assert wait_seconds(third, later) == 2


def test_a_good_replica_that_dies_during_a_back_off_is_replaced_at_once() -> None:
    waiting = after(VIEW, failed("qwen-a"))
    memory = after(replace(VIEW, failure=waiting.failure), failed("qwen-b", served_seconds=3600))
    assert memory.at_once == 1
    assert memory.failure is not None
    assert memory.failure.replica == "qwen-b"
    assert wait_seconds(memory) == 1


def test_a_change_of_the_spec_forgets() -> None:
    waiting = after(VIEW, failed())
    changed = replace(VIEW, failure=waiting.failure, generation=2)
    assert after(changed).failure is None
    outdated = replace(VIEW, launch_generation=2, generation=2, observed_generation=2)
    assert after(outdated, failed()).failure is None


def test_a_stable_replica_ends_the_memory() -> None:
    failure = Failure("qwen-a", "node-1", "it crashed", NOW, 3)
    view = replace(VIEW, failure=failure)
    since = NOW + timedelta(seconds=10)
    early = remember(view, [], [serving(since)], since + timedelta(seconds=59), POLICY)
    assert early.failure == failure
    assert early.forget_at == since + timedelta(seconds=60)
    assert remember(view, [], [serving(since)], since + timedelta(seconds=60), POLICY).failure is None
    older = serving(NOW - timedelta(seconds=500))
    assert remember(view, [], [older], NOW + timedelta(seconds=500), POLICY).failure == failure


def test_a_lagging_clock_of_an_agent_does_not_keep_the_memory() -> None:
    view = replace(VIEW, failure=Failure("qwen-a", "node-1", "it crashed", NOW, 3))
    placed = NOW + timedelta(seconds=5)
    lagging = replace(serving(NOW - timedelta(seconds=900)), created=placed)
    assert remember(view, [], [lagging], placed + timedelta(seconds=60), POLICY).failure is None


def test_a_back_off_that_is_over_is_no_longer_shown() -> None:
    failure = Failure("qwen-a", "node-1", "it crashed", NOW, 1, NOW + timedelta(seconds=1))
    memory = after(replace(VIEW, failure=failure), now=NOW + timedelta(seconds=1))
    assert memory.failure == replace(failure, next_attempt=None)


def test_a_clock_that_is_set_back_prolongs_no_wait() -> None:
    memory = after(VIEW, failed())
    view = replace(VIEW, failure=memory.failure)
    earlier = NOW - timedelta(hours=1)
    seen = after(view, now=earlier)
    assert wait_seconds(seen, earlier) == POLICY.back_off_max.total_seconds()
    # A replica that proves itself by the new clock ends the story as ever.
    view = replace(view, failure=seen.failure)
    later = earlier + POLICY.stable + timedelta(seconds=1)
    assert remember(view, [], [serving(earlier)], later, POLICY).failure is None
