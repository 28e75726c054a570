"""Default deny: every method has a role, and nobody without it gets through."""

from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
import pytest_asyncio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from millrace.agent.v1 import node_agent_service_pb2
from millrace.fleet.v1 import fleet_service_pb2
from millrace.scheduler.v1 import scheduler_service_pb2 as messages

from controlplane.api.policy import AGENT_POLICY, CONTROL_PLANE_POLICY
from core.errors import PermissionDenied, Unauthenticated
from core.identity import Role
from core.rpc import call_metadata
from tests.support.api_harness import FLEET_TOKEN, VIEWER_TOKEN, ApiHarness, running_api

SCHEDULER = messages.DESCRIPTOR.services_by_name["SchedulerService"]
MUTATIONS = ("Declare", "Update", "Scale", "Restart", "Delete", "Cordon", "Drain")


@pytest_asyncio.fixture
async def api() -> AsyncIterator[ApiHarness]:
    async with running_api() as harness:
        yield harness


def test_every_method_of_the_contract_has_a_role() -> None:
    files = (messages.DESCRIPTOR, fleet_service_pb2.DESCRIPTOR, node_agent_service_pb2.DESCRIPTOR)
    methods = {
        f"/{service.full_name}/{method.name}"
        for file in files
        for service in file.services_by_name.values()
        for method in service.methods
    }
    assert methods == {*CONTROL_PLANE_POLICY, *AGENT_POLICY}


def test_mutations_need_more_than_a_viewer() -> None:
    for method in SCHEDULER.methods:
        role = CONTROL_PLANE_POLICY[f"/{SCHEDULER.full_name}/{method.name}"]
        assert role is (Role.OPERATOR if method.name.startswith(MUTATIONS) else Role.VIEWER)


@pytest.mark.parametrize("method", [each.name for each in SCHEDULER.methods])
@pytest.mark.parametrize(
    ("token", "kind", "reason"),
    [
        ("", Unauthenticated, "ERROR_REASON_CREDENTIAL_MISSING"),
        ("wrong", Unauthenticated, "ERROR_REASON_CREDENTIAL_INVALID"),
        (FLEET_TOKEN, PermissionDenied, "ERROR_REASON_ROLE_INSUFFICIENT"),
    ],
)
async def test_nobody_else_gets_through(
    api: ApiHarness, method: str, token: str, kind: type[Exception], reason: str
) -> None:
    request = getattr(messages, f"{method}Request")()
    api.token = token
    with pytest.raises(kind) as refused:
        await _use(api, method, request)
    assert getattr(refused.value, "reason", "") == reason


async def _use(api: ApiHarness, method: str, request: Any) -> None:
    if SCHEDULER.methods_by_name[method].server_streaming:
        _ = [each async for each in api.read_all(method, request)]
    else:
        await api.call(method, request)


async def test_viewers_read_and_do_not_write(api: ApiHarness) -> None:
    await api.call("ListDeployments", messages.ListDeploymentsRequest(), token=VIEWER_TOKEN)
    error = await api.refusal("DeclareDeployments", messages.DeclareDeploymentsRequest(), token=VIEWER_TOKEN)
    assert isinstance(error, PermissionDenied)
    assert error.metadata["required_role"] == "operator"


async def test_missing_deployment_is_not_told_to_strangers(api: ApiHarness) -> None:
    request = messages.GetDeploymentRequest(namespace="team", name="none")
    assert isinstance(await api.refusal("GetDeployment", request, token="wrong"), Unauthenticated)


async def test_health_and_reflection_are_open(api: ApiHarness) -> None:
    health: Any = health_pb2_grpc.HealthStub(api.channel)
    answer = await health.Check(health_pb2.HealthCheckRequest())
    assert answer.status == health_pb2.HealthCheckResponse.SERVING
    channel: Any = api.channel
    stub: Any = reflection_pb2_grpc.ServerReflectionStub(channel)
    call = stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="")]))
    names = [service.name async for each in call for service in each.list_services_response.service]
    assert SCHEDULER.full_name in names


async def test_unknown_methods_are_unimplemented(api: ApiHarness) -> None:
    call: Any = api.channel.unary_unary("/millrace.scheduler.v1.SchedulerService/Nothing")
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await call(b"", metadata=call_metadata(api.token))
    assert refused.value.code() is grpc.StatusCode.UNIMPLEMENTED
