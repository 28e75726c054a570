from collections.abc import AsyncIterator

import pytest_asyncio
from millrace.core.v1 import types_pb2
from millrace.state.v1 import records_pb2

from core.store import Delete, keys
from core.store.memory import MemoryStore
from tests.support.clock import ManualClock
from tests.support.reconciled_cluster import NAMESPACE, ReconciledCluster

READY = types_pb2.DEPLOYMENT_PHASE_READY


@pytest_asyncio.fixture
async def cluster() -> AsyncIterator[ReconciledCluster]:
    clock = ManualClock()
    store = MemoryStore(clock)
    async with ReconciledCluster(store, clock) as cluster:
        yield cluster
    await store.close()


def clock_of(cluster: ReconciledCluster) -> ManualClock:
    assert isinstance(cluster.clock, ManualClock)
    return cluster.clock


async def ready(cluster: ReconciledCluster, name: str) -> bool:
    status = await cluster.status(name)
    return status.phase == READY and not status.reconciling


async def serve(cluster: ReconciledCluster, name: str) -> None:
    await cluster.drive(lambda: ready(cluster, name))
    await cluster.idle()


async def test_a_declared_model_comes_to_serve(cluster: ReconciledCluster) -> None:
    await cluster.add_node("node-1")
    record = await cluster.declare("qwen")
    await cluster.drive(cluster.assignments, agents=False)
    (assignment,) = (await cluster.assignments()).values()
    assert assignment.replica.startswith("qwen-")
    assert len(assignment.replica) == len("qwen-") + 10
    assert (assignment.node, assignment.deployment_uid) == ("node-1", record.uid)
    assert assignment.desired_state == types_pb2.REPLICA_STATE_READY
    assert assignment.fencing_token > 0
    assert [(each.device_id, each.memory_bytes) for each in assignment.devices] == [("cpu", 4 << 30)]
    launch = assignment.launch
    assert (launch.model, launch.served_model_name, launch.max_model_len) == ("org/model", "qwen", 2048)
    assert not await cluster.endpoints()
    assert (await cluster.status("qwen")).phase == types_pb2.DEPLOYMENT_PHASE_STARTING

    await serve(cluster, "qwen")
    (endpoint,) = (await cluster.endpoints()).values()
    assert endpoint.state == types_pb2.ENDPOINT_STATE_READY
    assert (endpoint.replica, endpoint.served_model_name) == (assignment.replica, "qwen")
    assert endpoint.declared_model == "org/model"
    assert endpoint.weight > 0
    (served,) = (await cluster.served()).values()
    assert (served.name, served.deployment_uid) == ("qwen", record.uid)
    took = served.measure_time.ToDatetime() - assignment.create_time.ToDatetime()
    assert served.start_duration.ToTimedelta() == took
    concluded = await cluster.concluded("qwen")
    assert concluded is not None
    assert [(each.type, each.status) for each in concluded.conditions] == [
        ("Scheduled", types_pb2.CONDITION_STATUS_TRUE),
        ("Available", types_pb2.CONDITION_STATUS_TRUE),
        ("Progressing", types_pb2.CONDITION_STATUS_TRUE),
    ]
    assert cluster.events.reasons() == ["Scheduled"]


async def test_a_quiet_cluster_is_left_alone(cluster: ReconciledCluster) -> None:
    await cluster.add_node("node-1")
    await cluster.declare("qwen")
    await serve(cluster, "qwen")
    revision = (await cluster.store.list(keys.PLAN_DEPLOYMENTS)).items[0].mod_revision
    for _ in range(3):
        await clock_of(cluster).advance(31)
    assert (await cluster.store.list(keys.PLAN_DEPLOYMENTS)).items[0].mod_revision == revision


async def test_a_killed_engine_is_replaced_at_once(cluster: ReconciledCluster) -> None:
    await cluster.add_node("node-1")
    await cluster.add_node("node-2")
    await cluster.declare("qwen", replicas=2)
    await serve(cluster, "qwen")
    before = await cluster.assignments()
    assert {each.node for each in before.values()} == {"node-1", "node-2"}
    await clock_of(cluster).advance(120)
    victim = min(before)
    await cluster.fail(before[victim])

    async def replaced() -> bool:
        now = await cluster.assignments()
        return victim not in now and len(now) == 2

    await cluster.drive(replaced, agents=False)
    assert victim not in await cluster.endpoints()
    status = await cluster.status("qwen")
    assert status.phase == types_pb2.DEPLOYMENT_PHASE_DEGRADED
    assert status.last_failure.replica == victim
    assert list(status.last_failure.log_tail) == ["loading weights", "RuntimeError: no such file", ""]
    assert not status.last_failure.HasField("next_attempt_time")
    (failed,) = cluster.events.of("ReplicaFailed")
    assert failed["warning"]
    assert "RuntimeError: no such file" in str(failed["message"])
    (replacement,) = cluster.events.of("ReplicaReplaced")
    assert victim in str(replacement["message"])
    await serve(cluster, "qwen")
    # It stays on record until the replacement has proved itself.
    assert (await cluster.status("qwen")).HasField("last_failure")
    await clock_of(cluster).advance(61)
    await cluster.idle()
    assert not (await cluster.status("qwen")).HasField("last_failure")


async def test_an_engine_that_does_not_start_is_retried_with_back_off(cluster: ReconciledCluster) -> None:
    cluster.failing.add("qwen")
    await cluster.add_node("node-1")
    await cluster.declare("qwen")
    for attempt, wait_seconds in enumerate((1, 2, 4), start=1):

        async def failed(attempt: int = attempt) -> bool:
            failure = (await cluster.status("qwen")).last_failure
            return failure.consecutive_failures == attempt and failure.HasField("next_attempt_time")

        await cluster.drive(failed)
        status = await cluster.status("qwen")
        assert status.phase == types_pb2.DEPLOYMENT_PHASE_FAILED
        assert status.conditions[0].reason == "BackOff"
        wait = (
            status.last_failure.next_attempt_time.ToNanoseconds() - status.last_failure.time.ToNanoseconds()
        )
        assert wait == wait_seconds * 1_000_000_000
        await clock_of(cluster).advance(wait_seconds - 0.5)
        assert not await cluster.assignments()
        await clock_of(cluster).advance(0.6)
        await cluster.drive(cluster.assignments, agents=False)
    # A change of the spec is a reason to try at once, and to forget.
    cluster.failing.clear()
    await cluster.change("qwen", relaunch=True)
    await serve(cluster, "qwen")


async def test_scaling_up_and_down(cluster: ReconciledCluster) -> None:
    await cluster.add_node("node-1")
    await cluster.add_node("node-2")
    await cluster.declare("qwen")
    await serve(cluster, "qwen")
    (first,) = await cluster.assignments()
    await clock_of(cluster).advance(1)
    await cluster.change("qwen", replicas=3)
    await serve(cluster, "qwen")
    assert len(await cluster.endpoints()) == 3
    await cluster.change("qwen", replicas=1)

    async def draining() -> list[str]:
        return [
            replica
            for replica, each in (await cluster.assignments()).items()
            if each.desired_state == types_pb2.REPLICA_STATE_DRAINING
        ]

    await cluster.drive(draining, agents=False)
    assert first not in await draining()
    for replica in await draining():
        order = await cluster.store.get(keys.plan_replica(NAMESPACE, "qwen", replica))
        endpoint = await cluster.store.get(keys.serve_endpoint(NAMESPACE, "qwen", replica))
        assert order is not None
        assert endpoint is not None
        assert order.mod_revision == endpoint.mod_revision
        assert (await cluster.endpoints())[replica].state == types_pb2.ENDPOINT_STATE_DRAINING
        assert (await cluster.assignments())[replica].HasField("drain_deadline_time")
    await serve(cluster, "qwen")
    assert list(await cluster.endpoints()) == [first]
    assert len(cluster.events.of("Removed")) == 2
    await cluster.change("qwen", replicas=0)
    stopped = types_pb2.DEPLOYMENT_PHASE_STOPPED

    async def gone() -> bool:
        return (await cluster.status("qwen")).phase == stopped and not await cluster.assignments()

    await cluster.drive(gone)
    assert not await cluster.endpoints()


async def test_a_deleted_deployment_leaves_nothing(cluster: ReconciledCluster) -> None:
    await cluster.add_node("node-1")
    await cluster.declare("qwen", replicas=2)
    await serve(cluster, "qwen")
    await cluster.store.commit([Delete(keys.spec_deployment(NAMESPACE, "qwen"))])

    async def gone() -> bool:
        return not await cluster.assignments() and not await cluster.endpoints()

    await cluster.drive(gone)
    assert await cluster.concluded("qwen") is None
    assert not await cluster.served()


async def test_a_deployment_declared_again_gets_its_own_replicas(cluster: ReconciledCluster) -> None:
    await cluster.add_node("node-1")
    await cluster.declare("qwen")
    await serve(cluster, "qwen")
    (old,) = await cluster.assignments()
    again = await cluster.declare("qwen")
    await serve(cluster, "qwen")
    (assignment,) = (await cluster.assignments()).values()
    assert assignment.replica != old
    assert assignment.deployment_uid == again.uid


async def test_an_update_replaces_replicas_one_by_one(cluster: ReconciledCluster) -> None:
    await cluster.add_node("node-1")
    await cluster.declare("qwen", replicas=2)
    await serve(cluster, "qwen")
    old = set(await cluster.assignments())
    await cluster.change("qwen", relaunch=True)
    fewest = 2
    most = 0

    async def updated() -> bool:
        nonlocal fewest, most
        states = [each.state for each in (await cluster.endpoints()).values()]
        fewest = min(fewest, states.count(types_pb2.ENDPOINT_STATE_READY))
        live = [
            each
            for each in (await cluster.assignments()).values()
            if each.desired_state == types_pb2.REPLICA_STATE_READY
        ]
        most = max(most, len(live))
        return await ready(cluster, "qwen")

    await cluster.drive(updated)
    assert not old & set(await cluster.assignments())
    assert fewest == 2
    assert most == 3


async def test_an_update_without_room_for_a_surge_drains_first(cluster: ReconciledCluster) -> None:
    await cluster.add_node("node-1", memory_gib=8)
    await cluster.declare("qwen", replicas=2)
    await serve(cluster, "qwen")
    await cluster.change("qwen", relaunch=True)
    fewest = 2

    async def updated() -> bool:
        nonlocal fewest
        states = [each.state for each in (await cluster.endpoints()).values()]
        fewest = min(fewest, states.count(types_pb2.ENDPOINT_STATE_READY))
        return await ready(cluster, "qwen")

    await cluster.drive(updated)
    assert fewest == 1


async def test_what_does_not_fit_says_so_until_a_node_comes(cluster: ReconciledCluster) -> None:
    await cluster.add_node("node-1", memory_gib=2)
    await cluster.add_node("node-2", memory_gib=16)
    await cluster.set_node("node-2", cordoned=True)
    await cluster.declare("qwen")

    async def unschedulable() -> bool:
        return (await cluster.status("qwen")).phase == types_pb2.DEPLOYMENT_PHASE_UNSCHEDULABLE

    await cluster.drive(unschedulable)
    condition = (await cluster.status("qwen")).conditions[0]
    assert condition.message == (
        "1 of 1 replica cannot be placed: needs 4.0 GiB on CPU; 2 nodes: 1 cordoned, "
        "1 out of memory (largest free 2.0 GiB); uncordon node node-2"
    )
    (event,) = cluster.events.of("Unschedulable")
    assert event["warning"]
    await cluster.add_node("node-3")
    await serve(cluster, "qwen")
    assert (await cluster.status("qwen")).conditions[0].reason == "Placed"


async def test_a_drained_node_is_emptied_without_an_outage(cluster: ReconciledCluster) -> None:
    await cluster.add_node("node-1")
    await cluster.declare("qwen")
    await serve(cluster, "qwen")
    (old,) = await cluster.assignments()
    await cluster.set_node("node-1", draining=True)
    await cluster.idle()
    # Nothing else can take it: it keeps serving.
    assert list(await cluster.endpoints()) == [old]
    assert "being drained" in (await cluster.status("qwen")).conditions[0].message
    await cluster.add_node("node-2")
    await serve(cluster, "qwen")
    (assignment,) = (await cluster.assignments()).values()
    assert assignment.node == "node-2"


async def test_a_lost_node_is_replaced_and_mass_silence_is_not(cluster: ReconciledCluster) -> None:
    lost, silent = types_pb2.NODE_STATE_LOST, types_pb2.NODE_STATE_SILENT
    for index in range(4):
        await cluster.add_node(f"node-{index}")
    await cluster.declare("qwen", replicas=4)
    await serve(cluster, "qwen")
    await cluster.add_node("node-0", state=silent)
    await cluster.idle()
    assert len(await cluster.endpoints()) == 4
    assert "node-0" in {each.node for each in (await cluster.assignments()).values()}
    await cluster.add_node("node-0", state=lost)
    await serve(cluster, "qwen")
    assert "node-0" not in {each.node for each in (await cluster.assignments()).values()}
    assert cluster.events.of("ReplicaLost")

    await cluster.add_node("node-1", state=lost)
    await cluster.add_node("node-2", state=lost)

    async def frozen() -> bool:
        return (await cluster.status("qwen")).conditions[0].reason == "ReschedulingFrozen"

    await cluster.drive(frozen, agents=False)
    (event,) = cluster.events.of("ReschedulingFrozen")
    assert event["namespace"] == "millrace-system"
    assert event["message"] == (
        "2 of 3 nodes are silent, more than 30%: that many at once point to a fault of the network or of the "
        "control plane, so nothing is moved off them"
    )


async def test_silence_of_the_only_node_takes_nothing_away(cluster: ReconciledCluster) -> None:
    await cluster.add_node("node-1")
    await cluster.declare("qwen")
    await serve(cluster, "qwen")
    before = set(await cluster.assignments())
    await cluster.add_node("node-1", state=types_pb2.NODE_STATE_LOST)

    async def frozen() -> bool:
        return (await cluster.status("qwen")).conditions[0].reason == "ReschedulingFrozen"

    await cluster.drive(frozen, agents=False)
    assert set(await cluster.assignments()) == before
    assert set(await cluster.endpoints()) == before
    condition = (await cluster.status("qwen")).conditions[0]
    assert condition.status == types_pb2.CONDITION_STATUS_UNKNOWN
    await cluster.add_node("node-1")
    await serve(cluster, "qwen")
    assert set(await cluster.assignments()) == before
    assert cluster.events.reasons()[-2:] == ["ReschedulingFrozen", "ReschedulingResumed"]


async def test_external_urls_get_one_replica_each(cluster: ReconciledCluster) -> None:
    await cluster.add_node("node-1")
    await cluster.add_node("node-2")
    urls = ["http://10.0.0.5:8000", "http://10.0.0.6:8000"]
    await cluster.declare("theirs", urls=urls)
    await serve(cluster, "theirs")
    assert sorted(each.url for each in (await cluster.endpoints()).values()) == urls
    assert {each.served_model_name for each in (await cluster.endpoints()).values()} == {"their-name"}
    await clock_of(cluster).advance(120)
    victim = next(
        each for each in (await cluster.assignments()).values() if each.launch.external_url == urls[1]
    )
    await cluster.fail(victim)
    await serve(cluster, "theirs")
    assert victim.replica not in await cluster.assignments()
    assert sorted(each.url for each in (await cluster.endpoints()).values()) == urls


async def test_an_unhealthy_replica_stays_an_endpoint_of_last_resort(cluster: ReconciledCluster) -> None:
    await cluster.add_node("node-1")
    await cluster.declare("qwen")
    await serve(cluster, "qwen")
    (assignment,) = (await cluster.assignments()).values()
    await cluster.report(assignment, types_pb2.REPLICA_STATE_READY, message="probe failed", healthy=False)

    async def unhealthy() -> bool:
        states = {each.state for each in (await cluster.endpoints()).values()}
        return states == {types_pb2.ENDPOINT_STATE_UNHEALTHY}

    await cluster.drive(unhealthy, agents=False)
    assert (await cluster.status("qwen")).ready_replicas == 0


async def test_an_outage_of_the_store_changes_nothing(cluster: ReconciledCluster) -> None:
    await cluster.add_node("node-1")
    await cluster.declare("qwen")
    await serve(cluster, "qwen")
    before = set(await cluster.assignments())
    memory = cluster.store
    assert isinstance(memory, MemoryStore)
    memory.set_available(False)
    await clock_of(cluster).advance(60)
    memory.set_available(True)
    for _ in range(60):
        await clock_of(cluster).advance(1)
        if cluster.reconciler.leading:
            break
    await cluster.change("qwen", replicas=2)
    for _ in range(60):
        await clock_of(cluster).advance(1)
        await cluster.agents_step()
        if await ready(cluster, "qwen"):
            break
    await cluster.idle()
    assert before < set(await cluster.assignments())
    assert len(await cluster.endpoints()) == 2


async def test_records_of_a_leader_carry_its_token(cluster: ReconciledCluster) -> None:
    await cluster.add_node("node-1")
    await cluster.declare("qwen")
    await cluster.drive(cluster.assignments, agents=False)
    leader = await cluster.store.get(keys.LIVE_LEADER)
    assert leader is not None
    assert records_pb2.LeaderRecord.FromString(leader.value).member_id == "member-a"
    (assignment,) = (await cluster.assignments()).values()
    assert assignment.fencing_token == leader.create_revision
