"""What a demanding user does with a local Millrace: the command line, HTTP, WebSocket, gRPC reflection.

One stack with simulated engines serves all of it. The command line runs as a process of its own and finds
`local.json` by itself, as a user's does.
"""

import asyncio
import io
import json
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import grpc
import pytest
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from tests.support.gateway import call, ready_replicas, wait_ready
from tests.support.stack import LocalStack, local_stack
from tests.support.waiting import eventually

pytestmark = pytest.mark.integration
COMMAND_SECONDS = 30.0


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalStack]:
    home = tmp_path_factory.mktemp("user")
    with local_stack(home / ".millrace", "--engine=simulator") as running:
        yield running


async def millrace(stack: LocalStack, *arguments: str, expect: int = 0) -> str:
    """Runs the command line where `local.json` is; returns stdout, or stderr where it should fail."""
    process = await asyncio.create_subprocess_exec(
        Path(sys.executable).with_name("millrace"),
        *arguments,
        cwd=stack.directory.parent,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    async with asyncio.timeout(COMMAND_SECONDS):
        output, errors = await process.communicate()
    assert process.returncode == expect, (arguments, output.decode(), errors.decode())
    return (errors if expect else output).decode()


async def chat(
    stack: LocalStack, key: str, model: str, headers: dict[str, str] | None = None
) -> tuple[int, Any, Any]:
    """Asks a question through the router; returns status, body and headers."""
    body = {"model": model, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}
    async with (
        aiohttp.ClientSession(trust_env=False) as session,
        session.post(
            stack.description["router_url"] + "/v1/chat/completions",
            json=body,
            headers={"authorization": f"Bearer {key}", **(headers or {})},
        ) as answer,
    ):
        return answer.status, await answer.json(), answer.headers


def declaration(namespace: str, **model: object) -> dict[str, object]:
    return {"namespace": namespace, "models": [{"model": "any/model", "engine": "simulator", **model}]}


async def test_a_life_on_the_command_line(stack: LocalStack) -> None:
    file = stack.directory.parent / "life.yaml"
    file.write_text(
        "namespace: cli\nmodels:\n  - {name: life, model: any/model, engine: simulator,"
        " extra_args: {inter_token_latency_ms: 1}}\n"
    )
    created = json.loads(await millrace(stack, "apply", "-f", "life.yaml", "--wait", "-o", "json"))
    (life,) = created["deployments"]
    assert life["result"] == "created"
    status, _, _ = await chat(stack, life["api_key"], "life")
    assert status == 200

    assert "cli/life unchanged" in await millrace(stack, "apply", "-f", "life.yaml")
    file.write_text(file.read_text().replace("_ms: 1}", "_ms: 2}"))
    assert "changed: extra_args" in await millrace(stack, "apply", "-f", "life.yaml", "--wait")

    await millrace(stack, "scale", "cli/life", "--replicas", "2", "--wait")
    assert "2/2" in await millrace(stack, "get", "-A")
    described = await millrace(stack, "describe", "life", "-n", "cli")
    assert "2 wanted, 2 ready" in described
    assert '{"inter_token_latency_ms": 2}' in described
    assert "one more replica fits" in described
    assert "scaled from 1 to 2" in await millrace(stack, "events", "life", "-n", "cli")
    assert "Application startup complete" in await millrace(stack, "logs", "cli/life")

    await millrace(stack, "delete", "cli/life", "--yes", "--wait")
    assert "there is no deployment `life`" in await millrace(stack, "get", "deployment", "cli/life", expect=3)
    assert "`millrace nodes` lists" in await millrace(stack, "drain", "nowhere", expect=3)
    assert "no valid namespace" in await millrace(stack, "get", "-n", "A B", expect=1)


async def test_a_failing_engine_says_why_in_describe(stack: LocalStack) -> None:
    await call(
        stack,
        "POST",
        "/v1/deployments",
        declaration("fails", name="broken", extra_args={"no_such_option": 1}),
        expect=201,
    )

    async def failed() -> bool:
        return "Last failure" in await millrace(stack, "describe", "fails/broken")

    await eventually(failed, timeout_seconds=10, interval_seconds=0.1)
    described = await millrace(stack, "describe", "fails/broken")
    assert "exit code 2" in described
    assert "unrecognized arguments: --no-such-option 1" in described
    await call(stack, "DELETE", "/v1/deployments/fails/broken", expect=204)


@asynccontextmanager
async def watching(stack: LocalStack, path: str) -> AsyncIterator[list[dict[str, Any]]]:
    """Collects the messages of a WebSocket until the block ends or the server closes it."""
    messages: list[dict[str, Any]] = []
    url = stack.description["gateway_url"] + path
    async with (
        aiohttp.ClientSession(headers=stack.admin_headers(), trust_env=False) as session,
        session.ws_connect(url) as socket,
    ):

        async def collect() -> None:
            async for message in socket:
                messages.append(message.json())  # noqa: PERF401 - read while it grows  # noqa: PERF401 - seen as they come, not at the end

        task = asyncio.create_task(collect(), name="collect")
        try:
            yield messages
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


async def test_a_watch_replays_and_then_follows(stack: LocalStack) -> None:
    await call(stack, "POST", "/v1/deployments", declaration("watched", name="one"), expect=201)
    await wait_ready(stack, "watched", "one", 1)
    async with watching(stack, "/v1/deployments/watched/one/watch") as messages:
        await eventually(lambda: {"type": "snapshot_end"} in messages, timeout_seconds=5)
        replayed = messages[: messages.index({"type": "snapshot_end"})]
        assert [each["reason"] for each in replayed if each["type"] == "event"] == [
            "Declared",
            "Scheduled",
            "ReplicaStarting",
            "ReplicaReady",
        ]
        assert any(each["type"] == "status" for each in replayed)
        await eventually(lambda: any(each["type"] == "log" for each in messages), timeout_seconds=5)

        await call(stack, "PATCH", "/v1/deployments/watched/one", {"replicas": 2})
        await eventually(
            lambda: any(each.get("reason") == "SpecChanged" for each in messages), timeout_seconds=5
        )
        await wait_ready(stack, "watched", "one", 2)
        await call(stack, "DELETE", "/v1/deployments/watched/one", expect=204)
        await eventually(lambda: {"type": "status", "deployment": None} in messages, timeout_seconds=5)


async def test_reflection_lists_the_services_without_a_credential(stack: LocalStack) -> None:
    def listed() -> set[str]:
        options = [("grpc.enable_http_proxy", 0)]
        with grpc.insecure_channel(stack.description["grpc_target"], options=options) as channel:
            return set(ProtoReflectionDescriptorDatabase(channel).get_services())

    assert await asyncio.to_thread(listed) >= {
        "grpc.health.v1.Health",
        "millrace.fleet.v1.FleetService",
        "millrace.scheduler.v1.SchedulerService",
    }


LLAMA_70B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_attention_heads": 64,
    "num_hidden_layers": 80,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "torch_dtype": "bfloat16",
}
REFUSED: list[tuple[dict[str, object], str, str]] = [
    ({"modle": "x"}, "models[0].modle", "did you mean `model`"),
    ({"name": ""}, "models[0].name", "is empty"),
    ({"name": "Bad Name"}, "models[0].name", "lower-case letters"),
    ({"engine": "vlm"}, "models[0].engine", "'vllm'"),
    ({"engine": "tgi"}, "models[0].engine", "use one of `vllm`"),
    ({"quantization": "int3"}, "models[0].quantization", "'awq'"),
    ({"max_model_len": 0}, "models[0].max_model_len", "at least 1"),
    ({"max_model_len": 10**12}, "models[0].max_model_len", "at most"),
    ({"replicas": -1}, "models[0].replicas", "at least 0"),
    ({"replicas": 10**9}, "models[0].replicas", "at most 1000"),
    ({"extra_args": []}, "models[0].extra_args", "an object is expected"),
    ({"engine": "vllm", "model": "/no/such/model"}, "models[0].model", "does not exist"),
    ({"engine": "vllm", "model": "./tiny"}, "models[0].model", "give an absolute path"),
    ({"engine": "vllm", "model": "LLAMA"}, "models[0].model", "add a node"),
    ({"engine": "external"}, "models[0].extra_args.urls", "http://10.0.0.5:8000"),
    ({"namespace": "millrace-system"}, "namespace", "is reserved"),
    ({"models": []}, "models", "give at least one"),
]


async def test_bad_input_names_the_field_and_makes_nothing(stack: LocalStack, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_70B))
    url = stack.description["gateway_url"] + "/v1/deployments"
    before = await call(stack, "GET", "/v1/deployments")
    problems: list[object] = []
    async with aiohttp.ClientSession(headers=stack.admin_headers(), trust_env=False) as session:
        for change, field, remedy in REFUSED:
            body: dict[str, Any] = {
                "namespace": "bad",
                "models": [
                    {"name": "good", "model": "x/y", "engine": "simulator"},
                    {"name": "bad", "model": "x/y", "engine": "simulator"},
                ],
            }
            model = {name: str(tmp_path) if value == "LLAMA" else value for name, value in change.items()}
            (body if change.keys() & {"namespace", "models"} else body["models"][0]).update(model)
            async with session.post(url, json=body) as answer:
                content = await answer.json()
                error = content.get("error", {"fields": [], "message": content})
                if not (
                    400 <= answer.status < 500
                    and field in [each["field"] for each in error["fields"]]
                    and remedy in error["message"]
                    and "\n" not in error["message"]
                ):
                    problems.append((change, answer.status, content))
        async with session.post(url, data='{"models": [,]}') as answer:
            assert answer.status == 400
            assert "line 1, column 13" in (await answer.json())["error"]["message"]
        async with session.post(url, data=io.BytesIO(b"x" * 1_100_000)) as answer:
            assert answer.status == 413
            assert "split the request" in (await answer.json())["error"]["fields"][0]["description"]
        async with session.put(url) as answer:
            assert answer.status == 405
    assert not problems
    after = await call(stack, "GET", "/v1/deployments")
    assert [each["name"] for each in after["deployments"]] == [each["name"] for each in before["deployments"]]


async def test_each_credential_opens_its_own_door_only(stack: LocalStack) -> None:
    url = stack.description["gateway_url"] + "/v1/deployments"
    async with aiohttp.ClientSession(trust_env=False) as session:
        for headers in ({}, {"authorization": "Bearer wrong"}, stack.user_headers()):
            async with session.post(url, headers=headers, json=declaration("no", name="no")) as answer:
                assert answer.status == 401
                assert "token" in (await answer.json())["error"]["message"]
    status, body, _ = await chat(stack, stack.description["admin_token"], "millrace-tiny")
    assert (status, body["error"]["code"]) == (401, "invalid_api_key")


async def test_a_request_id_is_returned_and_logged(stack: LocalStack) -> None:
    key = stack.description["api_key"]
    status, body, headers = await chat(stack, key, "millrace-tiny", {"x-request-id": "journey-1"})
    assert (status, headers["x-request-id"]) == (200, "journey-1")
    # The engine makes its answer's id of the request's.
    assert "journey-1" in body["id"]
    url = stack.description["gateway_url"] + "/v1/deployments/default/millrace-tiny"
    async with (
        aiohttp.ClientSession(headers=stack.admin_headers(), trust_env=False) as session,
        session.patch(url, json={"replicas": 1}, headers={"x-request-id": "journey-2"}) as answer,
    ):
        assert answer.headers["x-request-id"] == "journey-2"

    def lines(process: str, request_id: str) -> list[dict[str, Any]]:
        text = (stack.directory / "logs" / f"{process}.log").read_text()
        return [json.loads(each) for each in text.splitlines() if f'"{request_id}"' in each]

    await eventually(lambda: lines("router", "journey-1"), timeout_seconds=5)
    (routed,) = lines("router", "journey-1")
    assert routed["message"] == "request"
    names = {"time", "level", "message", "trace_id", "request_id", "model", "node", "endpoint", "version"}
    assert names <= routed.keys()
    # The HTTP request and the gRPC call behind it belong together.
    await eventually(lambda: len(lines("controlplane", "journey-2")) == 2, timeout_seconds=5)
    called, requested = lines("controlplane", "journey-2")
    assert called["trace_id"] == requested["trace_id"]
    secrets = {stack.description["admin_token"], key}
    for log in (stack.directory / "logs").glob("*.log"):
        assert not [secret for secret in secrets if secret in log.read_text()]


async def test_an_engine_of_someone_else_is_served_until_it_dies(stack: LocalStack) -> None:
    await call(stack, "POST", "/v1/deployments", declaration("theirs", name="origin"), expect=201)
    await wait_ready(stack, "theirs", "origin", 1)
    (origin,) = await ready_replicas(stack, "theirs", "origin")
    arguments = {"urls": [origin["url"]], "served_model_name": "origin"}
    declared = await call(
        stack,
        "POST",
        "/v1/deployments",
        declaration("ours", name="partner", engine="external", extra_args=arguments),
        expect=201,
    )
    key = declared["deployments"][0]["apiKey"]
    await wait_ready(stack, "ours", "partner", 1)
    status, body, _ = await chat(stack, key, "partner")
    assert (status, body["choices"][0]["message"]["role"]) == (200, "assistant")

    await call(stack, "DELETE", "/v1/deployments/theirs/origin", expect=204)

    async def left() -> bool:
        partner = await call(stack, "GET", "/v1/deployments/ours/partner")
        return bool(partner["ready_replicas"] == 0)

    await eventually(left, timeout_seconds=15, interval_seconds=0.05)

    async def refused() -> bool:
        status, _, headers = await chat(stack, key, "partner")
        return status == 503 and "retry-after" in headers

    await eventually(refused, timeout_seconds=10, interval_seconds=0.05)
    described = await millrace(stack, "describe", "ours/partner")
    assert "0 ready" in described
    assert origin["url"] in described
    await call(stack, "DELETE", "/v1/deployments/ours/partner", expect=204)
