"""The WebSocket: refusals before the upgrade, replay, following, a clean end."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
import pytest_asyncio
from aiohttp import WSMsgType, WSServerHandshakeError
from aiohttp.test_utils import TestClient, TestServer
from millrace.agent.v1 import node_agent_service_pb2, node_agent_service_pb2_grpc
from millrace.core.v1 import replica_pb2, types_pb2
from millrace.scheduler.v1 import scheduler_service_pb2 as messages

from controlplane.gateway.app import build_app
from controlplane.gateway.backend import Backend
from core.store import Put, keys
from tests.support.api_harness import ADMIN_TOKEN, FLEET_TOKEN, ApiHarness, running_api

PATH = "/v1/deployments/team/a/watch"
BEARER = {"Authorization": f"Bearer {ADMIN_TOKEN}"}


class FakeAgent(node_agent_service_pb2_grpc.NodeAgentServiceServicer):
    """Writes two lines a replica and goes on for as long as it is followed."""

    def __init__(self) -> None:
        self.tokens: list[str] = []

    async def GetInventory(self, request: Any, context: Any) -> Any:  # noqa: N802 - gRPC's name
        raise NotImplementedError

    async def ListEngines(self, request: Any, context: Any) -> Any:  # noqa: N802 - gRPC's name
        raise NotImplementedError

    async def StreamLogs(self, request: Any, context: Any) -> AsyncIterator[Any]:  # noqa: N802 - gRPC's name
        self.tokens.append(dict(context.invocation_metadata())["authorization"])
        for number in range(2):
            yield node_agent_service_pb2.StreamLogsResponse(line=f"{request.replica} line {number}")
        while request.follow:
            yield node_agent_service_pb2.StreamLogsResponse(progress=True)
            await asyncio.sleep(0.05)

    def StreamKvEvents(self, request: Any, context: Any) -> Any:  # noqa: N802 - gRPC's name
        raise NotImplementedError


@pytest_asyncio.fixture
async def api() -> AsyncIterator[ApiHarness]:
    async with running_api() as harness:
        yield harness


@pytest_asyncio.fixture
async def client(api: ApiHarness) -> AsyncIterator[Any]:
    backend = Backend(api.target)
    async with TestClient(TestServer(build_app(backend, ready=lambda: True))) as opened:
        yield opened
    await backend.close()


async def place(api: ApiHarness, replica: str) -> None:
    assignment = replica_pb2.ReplicaAssignment(
        namespace="team", deployment="a", replica=replica, node="node-1",
        desired_state=types_pb2.REPLICA_STATE_READY,
    )  # fmt: skip
    key = keys.plan_replica("team", "a", replica)
    commit = await api.store.commit([Put(key, assignment.SerializeToString())])
    await api.view.assignments.wait_for_revision(commit.revision, 5)


async def messages_until(socket: Any, kind: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    async with asyncio.timeout(10):
        while not (found and found[-1]["type"] == kind):
            found.append(await socket.receive_json())
    return found


@pytest.mark.parametrize(
    ("headers", "status"),
    [({}, 401), ({"Authorization": "Bearer wrong"}, 401), ({"Authorization": f"Bearer {FLEET_TOKEN}"}, 403)],
)
async def test_refused_before_the_upgrade(
    api: ApiHarness, client: Any, headers: dict[str, str], status: int
) -> None:
    await api.declare("a")
    with pytest.raises(WSServerHandshakeError) as refused:
        await client.ws_connect(PATH, headers=headers)
    assert refused.value.status == status


async def test_unknown_deployment_is_a_404(client: Any) -> None:
    with pytest.raises(WSServerHandshakeError) as refused:
        await client.ws_connect(PATH, headers=BEARER)
    assert refused.value.status == 404


async def test_token_in_the_url_is_refused(api: ApiHarness, client: Any) -> None:
    await api.declare("a")
    with pytest.raises(WSServerHandshakeError) as refused:
        await client.ws_connect(f"{PATH}?access_token={ADMIN_TOKEN}", headers=BEARER)
    assert refused.value.status == 400


@pytest.mark.parametrize("offered", [["millrace.v1", f"bearer.{ADMIN_TOKEN}"], [f"bearer.{ADMIN_TOKEN}"]])
async def test_browsers_authenticate_by_subprotocol(api: ApiHarness, client: Any, offered: list[str]) -> None:
    await api.declare("a")
    socket = await client.ws_connect(PATH, protocols=offered)
    assert socket.protocol == offered[0]
    await messages_until(socket, "snapshot_end")
    await socket.close()


async def test_replays_then_follows_status_and_events(api: ApiHarness, client: Any) -> None:
    await api.declare("a")
    await api.events.drained()
    socket = await client.ws_connect(PATH, headers=BEARER)
    opening = await messages_until(socket, "snapshot_end")
    assert {each["type"] for each in opening} == {"status", "event", "snapshot_end"}
    assert [each["reason"] for each in opening if each["type"] == "event"] == ["Declared"]
    await api.call("ScaleDeployment", messages.ScaleDeploymentRequest(namespace="team", name="a", replicas=2))
    followed = [await socket.receive_json(), await socket.receive_json()]
    by_type = {each["type"]: each for each in followed}
    assert by_type["status"]["deployment"]["replicas"] == 2
    assert by_type["event"]["reason"] == "SpecChanged"
    await socket.close()


async def test_deletion_is_said_and_ends_it(api: ApiHarness, client: Any) -> None:
    await api.declare("a")
    socket = await client.ws_connect(PATH, headers=BEARER)
    await messages_until(socket, "snapshot_end")
    await api.call("DeleteDeployment", messages.DeleteDeploymentRequest(namespace="team", name="a"))
    seen: list[Any] = []
    async with asyncio.timeout(10):
        while (message := await socket.receive()).type is WSMsgType.TEXT:
            seen.append(message.json())
    assert {"type": "status", "deployment": None} in seen
    assert socket.close_code == 1000


async def test_logs_of_every_replica_and_of_later_ones(api: ApiHarness, client: Any) -> None:
    agent, server = FakeAgent(), grpc.aio.server()
    node_agent_service_pb2_grpc.add_NodeAgentServiceServicer_to_server(agent, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    await api.add_node("node-1", agent_target=f"127.0.0.1:{port}")
    await api.declare("a")
    await place(api, "a-1")
    request = messages.StreamDeploymentLogsRequest(namespace="team", name="a")
    lines = [each.line async for each in api.read_all("StreamDeploymentLogs", request)]
    assert lines == ["a-1 line 0", "a-1 line 1"]
    socket = await client.ws_connect(PATH, headers=BEARER)
    seen: list[str] = []
    async with asyncio.timeout(10):
        while len(seen) < 4:
            message = await socket.receive_json()
            if message["type"] == "log":
                seen.append(message["line"])
            if len(seen) == 2 and message["type"] == "log":
                await place(api, "a-2")
    assert sorted(seen) == ["a-1 line 0", "a-1 line 1", "a-2 line 0", "a-2 line 1"]
    assert set(agent.tokens) == {f"Bearer {FLEET_TOKEN}"}
    await socket.close()
    await server.stop(0)


async def test_unreachable_agent_is_said_without_follow(api: ApiHarness) -> None:
    await api.add_node("node-1", agent_target="127.0.0.1:1")
    await api.declare("a")
    await place(api, "a-1")
    request = messages.StreamDeploymentLogsRequest(namespace="team", name="a")
    with pytest.raises(Exception, match="node-1") as refused:
        _ = [each async for each in api.read_all("StreamDeploymentLogs", request)]
    assert getattr(refused.value, "reason", "") == "ERROR_REASON_AGENT_UNREACHABLE"
