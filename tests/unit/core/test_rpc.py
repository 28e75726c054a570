"""A server denies by default and every error leaves as a rich status."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import pytest_asyncio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from millrace.agent.v1 import node_agent_service_pb2 as messages
from millrace.agent.v1 import node_agent_service_pb2_grpc

from core import errors
from core.identity import Principal, Role, TokenAuthenticator
from core.rpc import (
    TlsFiles,
    call_metadata,
    is_loopback,
    open_channel,
    principal_var,
    require_safe_bind,
    split_target,
    start_server,
)
from core.rpc_errors import from_rpc_error

SERVICE = "millrace.agent.v1.NodeAgentService"


class Servicer(node_agent_service_pb2_grpc.NodeAgentServiceServicer):
    async def GetInventory(self, request: Any, context: Any) -> messages.GetInventoryResponse:  # noqa: N802 - gRPC
        who = principal_var.get()
        assert who is not None
        answer = messages.GetInventoryResponse()
        answer.inventory.node = who.name
        return answer

    async def ListEngines(self, request: Any, context: Any) -> messages.ListEnginesResponse:  # noqa: N802 - gRPC
        raise ValueError("a secret detail")

    async def StreamLogs(  # noqa: N802 - gRPC
        self, request: messages.StreamLogsRequest, context: Any
    ) -> AsyncIterator[messages.StreamLogsResponse]:
        yield messages.StreamLogsResponse(line="one")
        raise errors.InvalidArgument(
            [errors.FieldViolation("replica", "unknown"), errors.FieldViolation("tail_lines", "too many")]
        )

    def StreamKvEvents(self, request: Any, context: Any) -> Any:  # noqa: N802 - gRPC
        raise NotImplementedError


@pytest_asyncio.fixture
async def channel() -> AsyncIterator[grpc.aio.Channel]:
    server = await start_server(
        host="127.0.0.1",
        port=0,
        register=lambda server: node_agent_service_pb2_grpc.add_NodeAgentServiceServicer_to_server(
            Servicer(), server
        ),
        service_names=[SERVICE],
        authenticator=TokenAuthenticator(
            {"fleet": Principal("fleet", Role.AGENT), "view": Principal("view", Role.VIEWER)}
        ),
        # StreamLogs is named, ListEngines for agents, and nothing else: the rest is refused.
        policy={
            f"/{SERVICE}/GetInventory": Role.AGENT,
            f"/{SERVICE}/ListEngines": Role.AGENT,
            f"/{SERVICE}/StreamLogs": Role.VIEWER,
        },
    )
    async with open_channel(f"127.0.0.1:{server.port}") as opened:
        yield opened
    await server.stop(0)


@pytest.mark.parametrize(
    ("token", "code", "reason"),
    [
        (None, grpc.StatusCode.UNAUTHENTICATED, "ERROR_REASON_CREDENTIAL_MISSING"),
        ("stranger", grpc.StatusCode.UNAUTHENTICATED, "ERROR_REASON_CREDENTIAL_INVALID"),
        ("view", grpc.StatusCode.PERMISSION_DENIED, "ERROR_REASON_ROLE_INSUFFICIENT"),
    ],
)
async def test_refusals(
    channel: grpc.aio.Channel, token: str | None, code: grpc.StatusCode, reason: str
) -> None:
    stub = node_agent_service_pb2_grpc.NodeAgentServiceStub(channel)
    metadata = call_metadata(token) if token else None
    with pytest.raises(grpc.RpcError) as refused:
        await stub.GetInventory(messages.GetInventoryRequest(), metadata=metadata)
    assert refused.value.code() is code
    assert from_rpc_error(refused.value).reason == reason


async def test_the_right_role_passes(channel: grpc.aio.Channel) -> None:
    stub = node_agent_service_pb2_grpc.NodeAgentServiceStub(channel)
    answer = await stub.GetInventory(messages.GetInventoryRequest(), metadata=call_metadata("fleet"))
    assert answer.inventory.node == "fleet"


async def test_an_unforeseen_error_hides_its_text(channel: grpc.aio.Channel) -> None:
    stub = node_agent_service_pb2_grpc.NodeAgentServiceStub(channel)
    with pytest.raises(grpc.RpcError) as failed:
        await stub.ListEngines(messages.ListEnginesRequest(), metadata=call_metadata("fleet"))
    assert failed.value.code() is grpc.StatusCode.INTERNAL
    assert "secret" not in (failed.value.details() or "")


async def test_a_stream_ends_with_its_fields(channel: grpc.aio.Channel) -> None:
    stub = node_agent_service_pb2_grpc.NodeAgentServiceStub(channel)
    call = stub.StreamLogs(messages.StreamLogsRequest(), metadata=call_metadata("view"))
    received = aiter(call)
    assert (await anext(received)).line == "one"
    with pytest.raises(grpc.RpcError) as failed:
        await anext(received)
    error = from_rpc_error(failed.value)
    assert isinstance(error, errors.InvalidArgument)
    assert [each.field for each in error.violations] == ["replica", "tail_lines"]


async def test_health_and_reflection_need_no_token(channel: grpc.aio.Channel) -> None:
    health: Any = health_pb2_grpc.HealthStub(channel)
    answer = await health.Check(health_pb2.HealthCheckRequest())
    assert answer.status == health_pb2.HealthCheckResponse.SERVING
    plain: Any = channel
    reflection: Any = reflection_pb2_grpc.ServerReflectionStub(plain)
    call = reflection.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="")]))
    async for listed in call:
        assert SERVICE in {each.name for each in listed.list_services_response.service}
        break
    call.cancel()
    await asyncio.sleep(0)


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        ("127.0.0.1", True),
        ("::1", True),
        ("[::1]", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("a", False),
    ],
)
def test_is_loopback(host: str, *, loopback: bool) -> None:
    assert is_loopback(host) is loopback


def test_plain_text_stays_on_this_machine() -> None:
    require_safe_bind("127.0.0.1", TlsFiles(), allow_plaintext=False, option="--grpc-host")
    require_safe_bind("0.0.0.0", TlsFiles(), allow_plaintext=True, option="--grpc-host")
    require_safe_bind("0.0.0.0", TlsFiles(Path("c"), Path("k")), allow_plaintext=False, option="--grpc-host")
    with pytest.raises(errors.InvalidArgument, match=r"--grpc-host.*TLS"):
        require_safe_bind("0.0.0.0", TlsFiles(), allow_plaintext=False, option="--grpc-host")


@pytest.mark.parametrize("target", ["", "host", "host:", ":1", "host:x", "host:70000"])
def test_bad_targets(target: str) -> None:
    with pytest.raises(errors.InvalidArgument):
        split_target(target)


def test_split_target() -> None:
    assert split_target("[::1]:7600") == ("[::1]", 7600)
