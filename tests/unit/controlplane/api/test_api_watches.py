"""Watches: snapshot, end, changes, resuming, slow watchers, events."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio
from millrace.core.v1 import deployment_pb2, replica_pb2, types_pb2
from millrace.scheduler.v1 import scheduler_service_pb2 as messages
from millrace.state.v1 import records_pb2

from controlplane.api import limits
from controlplane.api.watches import Buffer
from core.errors import InvalidArgument, OutOfRange, ResourceExhausted
from core.rpc import call_metadata
from core.store import Put, keys
from tests.support.api_harness import ApiHarness, running_api


@pytest_asyncio.fixture
async def api() -> AsyncIterator[ApiHarness]:
    async with running_api() as harness:
        yield harness


class Watch:
    """One open watch of the test."""

    def __init__(self, api: ApiHarness, method: str, request: Any) -> None:
        self.call = getattr(api.stub, method)(request, metadata=call_metadata(api.token))

    async def next(self) -> Any:
        """The next message that is not progress."""
        async with asyncio.timeout(10):
            while True:
                message = await self.call.read()
                if not message.progress:
                    return message

    async def until_snapshot_end(self) -> list[Any]:
        found: list[Any] = []
        while not (message := await self.next()).snapshot_end:
            found.append(message)
        return found

    def close(self) -> None:
        self.call.cancel()


def watch(api: ApiHarness, **fields: Any) -> Watch:
    return Watch(api, "WatchDeployments", messages.WatchDeploymentsRequest(**fields))


async def plan(api: ApiHarness, name: str, replica: str) -> None:
    item = await api.store.get(keys.spec_deployment("team", name))
    assert item is not None
    record = records_pb2.DeploymentRecord.FromString(item.value)
    assignment = replica_pb2.ReplicaAssignment(
        namespace="team",
        deployment=name,
        deployment_uid=record.uid,
        replica=replica,
        node="node-1",
        desired_state=types_pb2.REPLICA_STATE_READY,
    )
    key = keys.plan_replica("team", name, replica)
    await api.store.commit([Put(key, assignment.SerializeToString())])


async def observe(api: ApiHarness, name: str, replica: str, state: types_pb2.ReplicaState.ValueType) -> None:
    observation = replica_pb2.ReplicaObservation(
        namespace="team", deployment=name, replica=replica, node="node-1", state=state, healthy=True
    )
    key = keys.actual_replica("team", name, replica)
    await api.store.commit([Put(key, observation.SerializeToString())])


async def conclude(api: ApiHarness, name: str) -> None:
    record = api.view.record("team", name)
    available = deployment_pb2.Condition(type="Available", status=types_pb2.CONDITION_STATUS_TRUE)
    conclusion = records_pb2.DeploymentPlanRecord(
        namespace="team", name=name, deployment_uid=record.uid, conditions=[available]
    )
    key = keys.plan_deployment("team", name)
    await api.store.commit([Put(key, conclusion.SerializeToString())])


async def test_snapshot_then_changes_of_spec_plan_and_actual(api: ApiHarness) -> None:
    await api.declare("a", "b")
    open_watch = watch(api, namespace="team")
    names = [message.changed.name for message in await open_watch.until_snapshot_end()]
    assert names == ["a", "b"]
    await api.call("ScaleDeployment", messages.ScaleDeploymentRequest(namespace="team", name="a", replicas=2))
    assert (await open_watch.next()).changed.spec.replicas == 2
    await plan(api, "a", "a-1")
    assert len((await open_watch.next()).changed.status.replicas) == 1
    await observe(api, "a", "a-1", types_pb2.REPLICA_STATE_READY)
    (replica,) = (await open_watch.next()).changed.status.replicas
    assert replica.state == types_pb2.REPLICA_STATE_READY
    await conclude(api, "a")
    assert (await open_watch.next()).changed.status.ready_replicas == 1
    await api.call("DeleteDeployment", messages.DeleteDeploymentRequest(namespace="team", name="b"))
    assert (await open_watch.next()).deleted.name == "b"
    open_watch.close()


async def test_watch_of_one_sees_nothing_else(api: ApiHarness) -> None:
    await api.declare("a", "b")
    open_watch = watch(api, namespace="team", name="b")
    assert [each.changed.name for each in await open_watch.until_snapshot_end()] == ["b"]
    await api.declare("c")
    await api.call("DeleteDeployment", messages.DeleteDeploymentRequest(namespace="team", name="b"))
    assert (await open_watch.next()).deleted.name == "b"
    open_watch.close()


async def test_resuming_brings_what_was_missed_and_only_that(api: ApiHarness) -> None:
    await api.declare("changed", "deleted", "same", "placed")
    version = str((await api.store.list(keys.SPEC_DEPLOYMENTS)).revision)
    await api.call(
        "ScaleDeployment", messages.ScaleDeploymentRequest(namespace="team", name="changed", replicas=2)
    )
    await api.call("DeleteDeployment", messages.DeleteDeploymentRequest(namespace="team", name="deleted"))
    await plan(api, "placed", "placed-1")
    open_watch = watch(api, namespace="team", resource_version=version)
    seen = [await open_watch.next() for _ in range(3)]
    assert [each.changed.name or each.deleted.name for each in seen] == ["changed", "deleted", "placed"]
    assert seen[1].WhichOneof("kind") == "deleted"
    await api.declare("new")
    assert (await open_watch.next()).changed.name == "new"
    open_watch.close()


async def test_resuming_works_on_another_process(api: ApiHarness) -> None:
    await api.declare("a")
    version = str((await api.store.list(keys.SPEC_DEPLOYMENTS)).revision)
    await api.call("DeleteDeployment", messages.DeleteDeploymentRequest(namespace="team", name="a"))
    async with running_api(api.store) as other:
        open_watch = watch(other, resource_version=version)
        assert (await open_watch.next()).deleted.name == "a"
        open_watch.close()


async def test_compacted_version_is_out_of_range(api: ApiHarness) -> None:
    await api.declare("a")
    await api.declare("b")
    await api.store.compact((await api.store.list(keys.SPEC_DEPLOYMENTS)).revision)
    request = messages.WatchDeploymentsRequest(resource_version="2")
    error = await stream_refusal(api, "WatchDeployments", request)
    assert isinstance(error, OutOfRange)
    assert error.reason == "ERROR_REASON_RESOURCE_VERSION_TOO_OLD"
    assert error.metadata["resource_version"] == "2"
    events = await stream_refusal(
        api, "WatchEvents", messages.WatchEventsRequest(resource_version="2", follow=True)
    )
    assert isinstance(events, OutOfRange)


@pytest.mark.parametrize("version", ["x", "-1", "0", "9" * 30])
async def test_malformed_version_is_refused(api: ApiHarness, version: str) -> None:
    request = messages.WatchDeploymentsRequest(resource_version=version)
    assert isinstance(await stream_refusal(api, "WatchDeployments", request), InvalidArgument)


async def test_future_version_is_out_of_range(api: ApiHarness) -> None:
    request = messages.WatchDeploymentsRequest(resource_version="999999")
    assert isinstance(await stream_refusal(api, "WatchDeployments", request), OutOfRange)


async def test_full_buffer_ends_the_watch() -> None:
    buffer: Buffer[int] = Buffer()
    for number in range(limits.WATCH_BUFFER_MAX + 5):
        buffer.put(number)
    taken = [await buffer.get() for _ in range(limits.WATCH_BUFFER_MAX)]
    assert taken == list(range(limits.WATCH_BUFFER_MAX))
    with pytest.raises(ResourceExhausted):
        await buffer.get()


async def test_idle_watch_makes_progress(api: ApiHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "PROGRESS_SECONDS", 0.02)
    open_watch = watch(api)
    await open_watch.until_snapshot_end()
    async with asyncio.timeout(5):
        message = await open_watch.call.read()
    assert message.progress
    assert int(message.resource_version) >= 1
    open_watch.close()


async def test_events_replay_then_follow_and_resume(api: ApiHarness) -> None:
    for number in range(3):
        api.events.emit(namespace="team", deployment="a", reason=f"R{number}", message="m", source="test")
    api.events.emit(namespace="team", deployment="b", reason="Other", message="m", source="test")
    await api.events.drained()
    request = messages.WatchEventsRequest(namespace="team", deployment="a", follow=True)
    open_watch = Watch(api, "WatchEvents", request)
    replayed = await open_watch.until_snapshot_end()
    assert [each.event.reason for each in replayed] == ["R0", "R1", "R2"]
    version = replayed[-1].resource_version
    api.events.emit(namespace="team", deployment="a", reason="R3", message="m", source="test")
    assert (await open_watch.next()).event.reason == "R3"
    open_watch.close()
    request.resource_version = version
    resumed = Watch(api, "WatchEvents", request)
    assert (await resumed.next()).event.reason == "R3"
    resumed.close()


async def test_events_of_all_namespaces_come_in_order_of_time(api: ApiHarness) -> None:
    for namespace in ("z", "a", ""):
        api.events.emit(namespace=namespace, reason=namespace or "system", message="m", source="test")
    await api.events.drained()
    replayed = await Watch(api, "WatchEvents", messages.WatchEventsRequest()).until_snapshot_end()
    assert [each.event.reason for each in replayed] == ["z", "a", "system"]
    assert replayed[-1].event.namespace == "millrace-system"


async def stream_refusal(api: ApiHarness, method: str, request: Any) -> Exception:
    """The error that a stream ends with."""
    stream = api.read_all(method, request)
    try:
        async for _ in stream:
            pass
    except Exception as error:  # noqa: BLE001 - the error is what is asked for
        return error
    raise AssertionError(f"{method} was not refused")
