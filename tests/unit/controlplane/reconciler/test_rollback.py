from collections.abc import AsyncIterator

import pytest_asyncio
from millrace.core.v1 import types_pb2
from millrace.state.v1 import records_pb2

from core.store import keys
from core.store.memory import MemoryStore
from tests.support.clock import ManualClock
from tests.support.reconciled_cluster import NAMESPACE, ReconciledCluster

TRUE, FALSE = types_pb2.CONDITION_STATUS_TRUE, types_pb2.CONDITION_STATUS_FALSE


@pytest_asyncio.fixture
async def cluster() -> AsyncIterator[ReconciledCluster]:
    clock = ManualClock()
    store = MemoryStore(clock)
    async with ReconciledCluster(store, clock) as cluster:
        await cluster.add_node("node-1", memory_gib=32)
        yield cluster
    await store.close()


async def advance(cluster: ReconciledCluster, seconds: float) -> None:
    assert isinstance(cluster.clock, ManualClock)
    await cluster.clock.advance(seconds)


async def serve(cluster: ReconciledCluster) -> None:
    async def ready() -> bool:
        status = await cluster.status("qwen")
        return status.phase == types_pb2.DEPLOYMENT_PHASE_READY and not status.reconciling

    await cluster.drive(ready)
    await cluster.idle()


async def prove(cluster: ReconciledCluster) -> None:
    """Lets a launch serve for long enough to be one that can be gone back to."""
    await serve(cluster)
    await advance(cluster, 61)
    await cluster.idle()


async def write_spec(cluster: ReconciledCluster, model: str, *, deadline_seconds: int = 0) -> None:
    key = keys.spec_deployment(NAMESPACE, "qwen")
    found = await cluster.store.get(key)
    assert found is not None
    record = records_pb2.DeploymentRecord.FromString(found.value)
    record.spec.model = model
    record.generation += 1
    record.launch_generation += 1
    if deadline_seconds:
        record.spec.rollout.progress_deadline.FromSeconds(deadline_seconds)
    await cluster.put(key, record)


async def progressing(cluster: ReconciledCluster) -> tuple[int, str, str]:
    (found,) = [each for each in (await cluster.status("qwen")).conditions if each.type == "Progressing"]
    return found.status, found.reason, found.message


async def rolled_back(cluster: ReconciledCluster) -> bool:
    await advance(cluster, 1)
    return (await progressing(cluster))[1] == "RolledBack"


async def test_an_update_whose_engine_does_not_start_goes_back(cluster: ReconciledCluster) -> None:
    await cluster.declare("qwen", replicas=2)
    await prove(cluster)
    before = set(await cluster.assignments())
    cluster.failing.add("qwen")
    await write_spec(cluster, "org/broken")
    await cluster.drive(lambda: rolled_back(cluster))
    await cluster.drive(lambda: _only(cluster, before))

    # The engines of the spec before have served throughout.
    assert set(await cluster.endpoints()) == before
    status, _, message = await progressing(cluster)
    assert status == FALSE
    assert "launch generation 2 was rolled back: its replicas failed 3 times in a row" in message
    assert "the engine exited with status 1 (last log line: RuntimeError: no such file)" in message
    assert "2 replicas of launch generation 1 stay" in message
    assert "rollout restart" in message
    (event,) = cluster.events.of("RolledBack")
    assert event["warning"]
    assert "RuntimeError: no such file" in str(event["message"])
    found = await cluster.status("qwen")
    assert (found.rollout.launch_generation, found.rollout.serving_generation) == (2, 1)
    assert found.rollout.previous_spec.model == "org/model"
    assert found.phase == types_pb2.DEPLOYMENT_PHASE_READY
    assert not found.reconciling
    assert found.last_failure.log_tail
    # The spec is the user's.
    item = await cluster.store.get(keys.spec_deployment(NAMESPACE, "qwen"))
    assert item is not None
    assert records_pb2.DeploymentRecord.FromString(item.value).spec.model == "org/broken"

    # Nothing is tried again by itself, and what is lost comes back as it was.
    await advance(cluster, 700)
    cluster.failing.clear()
    victim = min(before)
    await cluster.fail((await cluster.assignments())[victim])
    await serve(cluster)
    assert {each.launch.model for each in (await cluster.assignments()).values()} == {"org/model"}
    assert {each.generation for each in (await cluster.assignments()).values()} == {1}
    assert len(await cluster.endpoints()) == 2

    # A change of the spec is the next attempt.
    await write_spec(cluster, "org/mended")
    await serve(cluster)
    assert {each.launch.model for each in (await cluster.assignments()).values()} == {"org/mended"}
    assert (await progressing(cluster))[:2] == (TRUE, "Complete")


async def _only(cluster: ReconciledCluster, replicas: set[str]) -> bool:
    return set(await cluster.assignments()) == replicas


async def test_an_update_that_comes_no_further_goes_back(cluster: ReconciledCluster) -> None:
    await cluster.declare("qwen")
    await prove(cluster)
    (before,) = await cluster.assignments()
    await write_spec(cluster, "org/slow", deadline_seconds=60)
    await cluster.drive(lambda: _count(cluster, 2), agents=False)
    await cluster.agents_step()
    await cluster.idle()
    # It starts, and starts, and starts.
    await advance(cluster, 59)
    assert (await progressing(cluster))[:2] == (TRUE, "RollingOut")
    await advance(cluster, 2)
    await cluster.idle()
    _, reason, message = await progressing(cluster)
    assert reason == "RolledBack"
    assert "no progress for 60 s with 0 replicas of it ready" in message
    await cluster.drive(lambda: _only(cluster, {before}))


async def _count(cluster: ReconciledCluster, count: int) -> bool:
    return len(await cluster.assignments()) == count


async def test_the_first_launch_has_nothing_to_go_back_to(cluster: ReconciledCluster) -> None:
    cluster.failing.add("qwen")
    await cluster.declare("qwen")

    async def failed_often() -> bool:
        await advance(cluster, 5)
        return (await cluster.status("qwen")).last_failure.consecutive_failures >= 4

    await cluster.drive(failed_often)
    assert (await progressing(cluster))[1] == "RollingOut"
    await advance(cluster, 700)
    await cluster.idle()
    status, reason, message = await progressing(cluster)
    assert (status, reason) == (FALSE, "ProgressDeadlineExceeded")
    assert "no earlier launch to go back to" in message


async def test_a_launch_that_crashes_soon_after_it_served_is_not_one_to_keep(
    cluster: ReconciledCluster,
) -> None:
    await cluster.declare("qwen")
    await prove(cluster)
    await write_spec(cluster, "org/fragile")
    await serve(cluster)
    assert (await progressing(cluster))[:2] == (TRUE, "Complete")
    for _ in range(3):
        await advance(cluster, 5)
        await cluster.drive(lambda: _count(cluster, 1), agents=False)
        await serve(cluster)
        (assignment,) = (await cluster.assignments()).values()
        await cluster.fail(assignment)
        await cluster.idle()
        await advance(cluster, 5)
    assert (await progressing(cluster))[1] == "RolledBack"
    await serve(cluster)
    (assignment,) = (await cluster.assignments()).values()
    assert assignment.launch.model == "org/model"


async def test_a_launch_that_serves_when_the_spec_changes_is_what_is_gone_back_to(
    cluster: ReconciledCluster,
) -> None:
    await cluster.declare("qwen", replicas=2)
    await prove(cluster)
    await write_spec(cluster, "org/better")
    await serve(cluster)
    better = set(await cluster.assignments())
    cluster.failing.add("qwen")
    await write_spec(cluster, "org/broken")
    await cluster.drive(lambda: rolled_back(cluster))
    await cluster.drive(lambda: _only(cluster, better))
    cluster.failing.clear()
    await cluster.fail((await cluster.assignments())[min(better)])
    await serve(cluster)
    assert {each.launch.model for each in (await cluster.assignments()).values()} == {"org/better"}
    assert (await cluster.status("qwen")).rollout.serving_generation == 2


async def test_a_new_leader_knows_what_was_rolled_back() -> None:
    clock = ManualClock()
    store = MemoryStore(clock)
    async with ReconciledCluster(store, clock) as first:
        await first.add_node("node-1", memory_gib=32)
        await first.declare("qwen")
        await prove(first)
        first.failing.add("qwen")
        await write_spec(first, "org/broken")
        await first.drive(lambda: rolled_back(first))
    async with ReconciledCluster(store, clock, member_id="member-b") as second:
        (assignment,) = [
            each
            for each in (await second.assignments()).values()
            if each.desired_state == types_pb2.REPLICA_STATE_READY
        ]
        await second.fail(assignment)
        await serve(second)
        (replacement,) = (await second.assignments()).values()
        assert replacement.launch.model == "org/model"
        assert (await progressing(second))[1] == "RolledBack"
    await store.close()
