"""A whole Millrace with simulated engines: what a user does, and what happens when things are killed."""

import asyncio
import os
import signal
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp
import openai
import psutil
import pytest

from deploy.local.options import BUNDLED_MODEL
from tests.support import gateway
from tests.support.failover import kill_under_load
from tests.support.gateway import call, ready_replicas
from tests.support.load import steady_load
from tests.support.stack import LocalStack, launch, local_stack
from tests.support.waiting import eventually

pytestmark = pytest.mark.integration
NAMESPACE, NAME = "default", "millrace-tiny"
CLIENTS = 4


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalStack]:
    directory = tmp_path_factory.mktemp("stack")
    with local_stack(directory, "--engine=simulator", "--replicas=2") as running:
        yield running


async def replicas(stack: LocalStack, namespace: str = NAMESPACE, name: str = NAME) -> list[dict[str, Any]]:
    """Returns the replicas that serve."""
    return await ready_replicas(stack, namespace, name)


async def wait_ready(stack: LocalStack, count: int, namespace: str = NAMESPACE, name: str = NAME) -> None:
    await gateway.wait_ready(stack, namespace, name, count)


def client(stack: LocalStack) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(
        base_url=stack.description["router_url"] + "/v1", api_key=stack.description["api_key"]
    )


async def test_it_says_what_a_user_needs(stack: LocalStack) -> None:
    local = stack.description
    assert set(local) == {
        "router_url",
        "gateway_url",
        "grpc_target",
        "etcd_endpoints",
        "namespace",
        "deployment",
        "model",
        "api_key",
        "admin_token",
        "pids",
    }
    assert set(local["pids"]) == {"etcd", "controlplane", "nodeagent", "router"}
    assert (stack.directory / "local.json").stat().st_mode & 0o077 == 0
    assert f"{local['router_url']}/v1" in stack.text
    assert local["api_key"] in stack.text
    for pid in local["pids"].values():
        line = " ".join(psutil.Process(pid).cmdline())
        assert local["admin_token"] not in line
        assert local["api_key"] not in line


async def test_a_second_start_in_the_same_folder_is_refused(stack: LocalStack) -> None:
    before = stack.text
    second = launch(stack.directory, "--engine=simulator")
    assert await asyncio.to_thread(second.process.wait, 30) == 1
    assert "runs here already" in stack.text.removeprefix(before)


async def test_a_taken_port_is_named_with_its_option(stack: LocalStack, tmp_path: Path) -> None:
    port = stack.description["router_url"].rsplit(":", 1)[1]
    second = launch(tmp_path, "--engine=simulator", f"--router-port={port}")
    assert await asyncio.to_thread(second.process.wait, 30) == 1
    assert f"port {port} is taken" in second.text
    assert "--router-port" in second.text


async def test_the_openai_client_chats_streams_and_lists(stack: LocalStack) -> None:
    async with client(stack) as user:
        messages: Any = [{"role": "user", "content": "hello there"}]
        whole = await user.chat.completions.create(model=NAME, messages=messages, max_tokens=6)
        assert whole.usage is not None
        assert whole.usage.completion_tokens == 6
        stream = await user.chat.completions.create(model=NAME, messages=messages, max_tokens=6, stream=True)
        parts = [chunk.choices[0].delta.content or "" async for chunk in stream if chunk.choices]
        assert "".join(parts) == whole.choices[0].message.content
        assert [model.id async for model in user.models.list()] == [NAME]
        with pytest.raises(openai.NotFoundError):
            await user.chat.completions.create(model="nobody-declared-this", messages=messages)
    async with openai.AsyncOpenAI(base_url=stack.description["router_url"] + "/v1", api_key="sk-no") as bad:
        with pytest.raises(openai.AuthenticationError):
            await bad.models.list()


async def test_declare_exactly_as_documented_then_use_scale_and_delete(stack: LocalStack) -> None:
    request = {
        "models": [
            {
                "name": "qwen-72b",
                "model": str(BUNDLED_MODEL),
                "engine": "simulator",
                "quantization": "none",
                "max_model_len": 2048,
                "replicas": 1,
                "extra_args": {},
            }
        ],
        "namespace": "team-ai",
        "metadata": {"userId": "user-001", "teamId": "team-001", "source": "cli"},
    }
    answer = await call(stack, "POST", "/v1/deployments", request, expect=201)
    assert answer["namespace"] == "team-ai"
    declared = answer["deployments"][0]
    assert declared["endpoint"] == stack.description["router_url"] + "/v1"
    assert declared["apiKey"].startswith("sk-")
    assert declared["watch"].startswith("ws://")
    assert declared["sizing"]["summary"]

    await call(stack, "POST", "/v1/deployments", request, expect=409)
    await wait_ready(stack, 1, "team-ai", "qwen-72b")
    messages: Any = [{"role": "user", "content": "hi"}]
    async with openai.AsyncOpenAI(base_url=declared["endpoint"], api_key=declared["apiKey"]) as user:
        await user.chat.completions.create(model="qwen-72b", messages=messages, max_tokens=3)
        await user.chat.completions.create(model=str(BUNDLED_MODEL), messages=messages, max_tokens=3)
        with pytest.raises(openai.NotFoundError):
            await user.chat.completions.create(model=NAME, messages=messages)
        await call(stack, "PATCH", "/v1/deployments/team-ai/qwen-72b", {"replicas": 3})
        await wait_ready(stack, 3, "team-ai", "qwen-72b")
        await call(stack, "PATCH", "/v1/deployments/team-ai/qwen-72b", {"replicas": 1})
        await wait_ready(stack, 1, "team-ai", "qwen-72b")
    await call(stack, "DELETE", "/v1/deployments/team-ai/qwen-72b", expect=204)
    await call(stack, "GET", "/v1/deployments/team-ai/qwen-72b", expect=404)
    await eventually(lambda: len(stack.engine_pids()) == 2, timeout_seconds=30)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_killed_engine_is_replaced_and_only_its_own_requests_may_fail(
    stack: LocalStack, *, stream: bool
) -> None:
    await wait_ready(stack, 2)
    account = await kill_under_load(
        stack.description["router_url"],
        stack.user_headers(),
        model=NAME,
        replicas=partial(replicas, stack),
        router_log=stack.directory / "logs" / "router.log",
        stream=stream,
    )
    assert account.others == []
    assert len(account.inside) <= 4, "at most the requests that were inside the killed engine"
    assert account.last_use_seconds < 1.0


async def _kill_and_wait_for_return(stack: LocalStack, name: str) -> None:
    before = stack.description["pids"][name]
    os.kill(before, signal.SIGKILL)
    await eventually(lambda: stack.description["pids"][name] != before, timeout_seconds=20)


async def _converged(stack: LocalStack) -> bool:
    try:
        return len(await replicas(stack)) == 2
    except (aiohttp.ClientError, AssertionError):
        return False


@pytest.mark.parametrize("name", ["controlplane", "nodeagent", "etcd"])
async def test_a_killed_process_returns_and_nobody_notices(stack: LocalStack, name: str) -> None:
    await wait_ready(stack, 2)
    engines, local = stack.engine_pids(), stack.description
    async with steady_load(local["router_url"], stack.user_headers(), model=NAME) as load:
        await eventually(lambda: len(load.outcomes) > 20)
        await _kill_and_wait_for_return(stack, name)
        returned = time.monotonic()
        await eventually(lambda: _converged(stack), timeout_seconds=30, interval_seconds=0.1)
        await eventually(lambda: load.succeeded_since(returned) > 100, timeout_seconds=20)
    assert load.failures == []
    assert stack.engine_pids() == engines


async def test_after_the_agents_return_a_dead_engine_is_still_noticed(stack: LocalStack) -> None:
    await wait_ready(stack, 2)
    await _kill_and_wait_for_return(stack, "nodeagent")
    victim = stack.engine_pids()[0]
    os.kill(victim, signal.SIGKILL)
    await eventually(
        lambda: victim not in stack.engine_pids() and len(stack.engine_pids()) == 2, timeout_seconds=30
    )
    await wait_ready(stack, 2)


async def test_a_killed_router_fails_only_what_was_inside_it(stack: LocalStack) -> None:
    await wait_ready(stack, 2)
    engines, local = stack.engine_pids(), stack.description
    async with steady_load(local["router_url"], stack.user_headers(), model=NAME) as load:
        await eventually(lambda: len(load.outcomes) > 20)
        killed = time.monotonic()
        await _kill_and_wait_for_return(stack, "router")
        await eventually(lambda: load.succeeded_since(killed) > 100, timeout_seconds=30)
    # Each client has one connection; the killed router held it, with or without a request on it.
    assert len(load.failures) <= CLIENTS
    assert all(each.status == 0 for each in load.failures), "nobody is turned away while it starts"
    assert stack.engine_pids() == engines


async def test_ctrl_c_leaves_nothing(tmp_path: Path) -> None:
    with local_stack(tmp_path, "--engine=simulator") as own:
        engines = own.engine_pids()
        assert len(engines) == 1
        assert own.stop() == 0
        assert not (tmp_path / "local.json").exists()
        assert not any(psutil.pid_exists(pid) for pid in engines)
