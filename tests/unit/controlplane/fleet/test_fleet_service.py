"""Fleet against a store in memory and a real gRPC server: what agents see and what is recorded."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass

import grpc
import pytest
import pytest_asyncio
from millrace.core.v1 import node_pb2, replica_pb2, stats_pb2, types_pb2
from millrace.fleet.v1 import fleet_service_pb2 as messages
from millrace.fleet.v1 import fleet_service_pb2_grpc
from millrace.state.v1 import records_pb2

from controlplane.fleet.service import SERVICE_NAME, FleetService
from core.clock import SystemClock
from core.identity import Principal, Role, TokenAuthenticator
from core.rpc import call_metadata, open_channel, start_server
from core.store import Delete, MemoryStore, Put, keys
from core.tasks import cancel_and_wait
from tests.support.recorded_events import RecordedEvents
from tests.support.waiting import eventually

TOKEN = "fleet-token"


@dataclass
class World:
    store: MemoryStore
    fleet: FleetService
    stub: "fleet_service_pb2_grpc.FleetServiceAsyncStub"
    events: RecordedEvents

    async def open(self, *replicas: replica_pb2.ReplicaObservation) -> str:
        answer = await self.stub.OpenSession(
            messages.OpenSessionRequest(
                inventory=node_pb2.NodeInventory(node="n1"), replicas=replicas, agent_incarnation="a"
            ),
            metadata=call_metadata(TOKEN),
        )
        return answer.session_id

    async def assign(self, replica: str, node: str = "n1") -> None:
        commit = await self.store.commit(
            [
                Put(
                    keys.plan_replica("ns", "d", replica),
                    replica_pb2.ReplicaAssignment(
                        namespace="ns", deployment="d", replica=replica, node=node
                    ).SerializeToString(),
                )
            ]
        )
        await self.fleet._plans.wait_for_revision(commit.revision, 5)

    async def settled(self) -> None:
        """Waits until fleet sees every observation that is stored."""
        page = await self.store.list(keys.ACTUAL_REPLICAS)
        last = max((item.mod_revision for item in page.items), default=0)
        await self.fleet._actual.wait_for_revision(last, 5)

    async def node(self) -> records_pb2.NodeObservationRecord:
        found = await self.store.get(keys.actual_node("n1"))
        assert found is not None
        return records_pb2.NodeObservationRecord.FromString(found.value)

    async def observed(self, replica: str) -> replica_pb2.ReplicaObservation | None:
        found = await self.store.get(keys.actual_replica("ns", "d", replica))
        return replica_pb2.ReplicaObservation.FromString(found.value) if found else None


def observation(
    replica: str, state: types_pb2.ReplicaState.ValueType, url: str = ""
) -> replica_pb2.ReplicaObservation:
    return replica_pb2.ReplicaObservation(
        namespace="ns", deployment="d", replica=replica, state=state, healthy=True, url=url
    )


@pytest_asyncio.fixture
async def world() -> AsyncIterator[World]:
    store, events = MemoryStore(SystemClock()), RecordedEvents()
    fleet = FleetService(store, SystemClock(), events, heartbeat_seconds=0.1, lost_after_seconds=0.8)
    methods = messages.DESCRIPTOR.services_by_name["FleetService"].methods
    server = await start_server(
        host="127.0.0.1",
        port=0,
        register=fleet.register,
        service_names=[SERVICE_NAME],
        authenticator=TokenAuthenticator({TOKEN: Principal("fleet", Role.AGENT)}),
        policy={f"/{SERVICE_NAME}/{method.name}": Role.AGENT for method in methods},
    )
    running = asyncio.create_task(fleet.run(), name="fleet")
    async with open_channel(f"127.0.0.1:{server.port}") as channel:
        yield World(store, fleet, fleet_service_pb2_grpc.FleetServiceStub(channel), events)
    await cancel_and_wait(running)
    await server.stop(0)
    await store.close()


async def test_assignments_come_complete_then_as_changes(world: World) -> None:
    await world.assign("r1")
    session = await world.open()
    stream = world.stub.WatchAssignments(
        messages.WatchAssignmentsRequest(session_id=session), metadata=call_metadata(TOKEN)
    )
    changes = aiter(stream)
    complete = await anext(changes)
    assert complete.kind == messages.ASSIGNMENTS_KIND_COMPLETE
    assert [each.replica for each in complete.assigned] == ["r1"]

    await world.assign("r2")
    await world.assign("elsewhere", node="n2")
    added = await anext(changes)
    assert (added.applies_to, [each.replica for each in added.assigned]) == (complete.results_in, ["r2"])

    await world.store.commit([Delete(keys.plan_replica("ns", "d", "r1"))])
    seen = [added]
    while not seen[-1].removed_replicas:
        seen.append(await anext(changes))
        assert seen[-1].applies_to == seen[-2].results_in
    assert list(seen[-1].removed_replicas) == ["r1"]
    stream.cancel()


async def test_reports_only_move_forward_and_unknown_replicas_are_named(world: World) -> None:
    await world.assign("r1")
    session = await world.open()

    async def report(*replicas: replica_pb2.ReplicaObservation) -> list[str]:
        answer = await world.stub.ReportReplicas(
            messages.ReportReplicasRequest(session_id=session, replicas=replicas),
            metadata=call_metadata(TOKEN),
        )
        return list(answer.unknown)

    assert await report(observation("r1", types_pb2.REPLICA_STATE_READY, url="http://a")) == []
    assert await report(observation("r1", types_pb2.REPLICA_STATE_STARTING)) == []
    stored = await world.observed("r1")
    assert stored is not None
    assert (stored.state, stored.url, stored.node) == (types_pb2.REPLICA_STATE_READY, "http://a", "n1")
    assert await report(observation("ghost", types_pb2.REPLICA_STATE_READY)) == ["ghost"]
    assert await world.observed("ghost") is None
    assert world.events.reasons().count("ReplicaReady") == 1


async def test_an_observation_ends_with_its_assignment(world: World) -> None:
    await world.assign("r1")
    await world.open(observation("r1", types_pb2.REPLICA_STATE_READY))
    assert await world.observed("r1") is not None
    await world.store.commit([Delete(keys.plan_replica("ns", "d", "r1"))])

    async def forgotten() -> bool:
        return await world.observed("r1") is None

    await eventually(forgotten)


async def test_what_a_returning_agent_does_not_know_has_failed(world: World) -> None:
    for replica in ("kept", "gone", "fresh"):
        await world.assign(replica)
    await world.open(
        observation("kept", types_pb2.REPLICA_STATE_READY),
        observation("gone", types_pb2.REPLICA_STATE_READY),
        observation("fresh", types_pb2.REPLICA_STATE_PREPARING),
    )
    await world.settled()
    await world.open(observation("kept", types_pb2.REPLICA_STATE_READY))
    states = {}
    for replica in ("kept", "gone", "fresh"):
        seen = await world.observed(replica)
        assert seen is not None
        states[replica] = seen.state
    assert states == {
        "kept": types_pb2.REPLICA_STATE_READY,
        "gone": types_pb2.REPLICA_STATE_FAILED,
        "fresh": types_pb2.REPLICA_STATE_PREPARING,
    }


async def test_a_node_falls_silent_then_is_lost_then_returns(world: World) -> None:
    await world.open()

    async def state_is(state: types_pb2.NodeState.ValueType) -> bool:
        return (await world.node()).state == state

    await eventually(lambda: state_is(types_pb2.NODE_STATE_SILENT))
    await eventually(lambda: state_is(types_pb2.NODE_STATE_LOST))
    await world.open()
    assert await state_is(types_pb2.NODE_STATE_READY)
    await eventually(lambda: {"NodeSilent", "NodeLost"} <= set(world.events.reasons()))


async def test_a_newer_session_ends_the_older_one(world: World) -> None:
    older = await world.open()
    newer = await world.open()
    with pytest.raises(grpc.RpcError) as refused:
        await world.stub.Heartbeat(messages.HeartbeatRequest(session_id=older), metadata=call_metadata(TOKEN))
    assert refused.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    answer = await world.stub.Heartbeat(
        messages.HeartbeatRequest(session_id=newer), metadata=call_metadata(TOKEN)
    )
    assert answer.heartbeat_period.ToMilliseconds() == 100


async def test_samples_are_kept_for_assigned_replicas_only(world: World) -> None:
    await world.assign("r1")
    session = await world.open()
    samples = [
        stats_pb2.EngineStats(namespace="ns", deployment="d", replica=replica, running_requests=3)
        for replica in ("r1", "ghost")
    ]
    await world.stub.ReportStats(
        messages.ReportStatsRequest(session_id=session, engines=samples), metadata=call_metadata(TOKEN)
    )

    async def written() -> bool:
        return bool((await world.store.list(keys.STATS)).items)

    await eventually(written)
    page = await world.store.list(keys.STATS)
    assert [item.key for item in page.items] == [keys.stats("ns", "d", "r1")]
    assert page.items[0].lease_id != 0


@pytest.mark.parametrize("node", ["", "UPPER", "-x", "a" * 64, "x/y"])
async def test_bad_node_names_are_refused_with_the_field(world: World, node: str) -> None:
    with pytest.raises(grpc.RpcError) as refused:
        await world.stub.OpenSession(
            messages.OpenSessionRequest(inventory=node_pb2.NodeInventory(node=node)),
            metadata=call_metadata(TOKEN),
        )
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "inventory.node" in (refused.value.details() or "")


async def test_a_stranger_is_refused(world: World) -> None:
    with pytest.raises(grpc.RpcError) as refused:
        await world.stub.Heartbeat(messages.HeartbeatRequest(session_id="x"))
    assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED
