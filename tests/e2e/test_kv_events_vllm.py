"""Real vLLM's KV events: the agent's mirror reads them, and the simulator hashes as vLLM does."""

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from google.protobuf.struct_pb2 import Struct
from millrace.core.v1 import node_pb2, replica_pb2, types_pb2

from core.block_hash import block_hash, event_hash
from core.clock import SystemClock
from core.tasks import cancel_and_wait
from deploy.local.engine_environment import default_engines_directory, environment_name
from nodeagent.engines.base import ClaimedDevice
from nodeagent.engines.vllm import VllmAdapter
from nodeagent.kv_events.mirror import CacheMirror, HashScheme
from nodeagent.kv_events.reader import EventReader, read_sources
from nodeagent.kv_events.stream import follow
from router.prefix.exact.copy import CacheCopy
from router.prefix.exact.tokens import PromptTokenizer
from router.view.view import Endpoint, EndpointState
from tests.support.ports import free_ports
from tests.support.stack import REPOSITORY
from tests.support.waiting import eventually

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]
BLOCK_TOKENS = 32
CPU = node_pb2.Device(id="cpu", kind=types_pb2.DEVICE_KIND_CPU, memory_bytes=16 * 2**30)


@pytest.fixture(scope="module")
def vllm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The bundled model on vLLM, with 24 blocks only so that it evicts."""
    if environment_name() != "vllm-cpu":
        pytest.skip("the sizes of this test are the CPU build's")
    engines = default_engines_directory()
    assert (engines / "vllm-cpu/INSTALLED").exists(), "run `python -m deploy.local.engine_environment`"
    folder = tmp_path_factory.mktemp("vllm")
    extra = Struct()
    extra.update(
        {"kv_events": True, "block_size": BLOCK_TOKENS, "num_gpu_blocks_override": 24, "max_num_seqs": 4}
    )
    launch = replica_pb2.LaunchSpec(
        engine=types_pb2.ENGINE_VLLM,
        model=str(REPOSITORY / "deploy/models/millrace-tiny"),
        served_model_name="tiny",
        max_model_len=512,
        kv_cache_bytes=2**28,
        extra_args=extra,
    )
    adapter = VllmAdapter(
        engines, frozenset({int(types_pb2.DEVICE_KIND_CPU)}), 1, socket_directory=folder / "sockets"
    )
    (port,) = free_ports(1)
    command = adapter.command(launch, host="127.0.0.1", port=port, devices=[ClaimedDevice(CPU, 2**32)])
    environment = {**os.environ, **command.environment, "VLLM_SERVER_DEV_MODE": "1"}
    environment.pop("PYTHONHASHSEED", None)
    log = folder / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command.argv, env=environment, stdout=output, stderr=output, cwd=folder, start_new_session=True
        )
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(process.pid, 9)
        process.wait()
        sys.stdout.write(log.read_text(errors="replace")[-2000:])


async def answers(url: str) -> bool:
    try:
        async with aiohttp.ClientSession() as client, client.get(f"{url}/health") as response:
            return response.status == 200
    except aiohttp.ClientError:
        return False


async def post(url: str, path: str, body: Any = None) -> Any:
    async with aiohttp.ClientSession() as client, client.post(f"{url}{path}", json=body) as response:
        assert response.status == 200, await response.text()
        return await response.json()


async def complete(url: str, token_ids: list[int], **fields: Any) -> Any:
    body = {"model": "tiny", "prompt": token_ids, "max_tokens": 1, "temperature": 0, **fields}
    return await post(url, "/v1/completions", body)


def chain(token_ids: list[int]) -> list[int]:
    hashes, parent = [], None
    for start in range(0, len(token_ids) - BLOCK_TOKENS + 1, BLOCK_TOKENS):
        parent = block_hash(parent, token_ids[start : start + BLOCK_TOKENS])
        hashes.append(event_hash(parent))
    return hashes


async def simulated(folder: Path, prompts: list[list[int]]) -> frozenset[int]:
    """What the simulator tells of its cache after the same prompts."""
    (port,) = free_ports(1)
    events = f'"endpoint":"ipc://{folder}/kv","replay_endpoint":"ipc://{folder}/replay"'
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "nodeagent.engines.simulator", "--model", "tiny", "--port", str(port)),
        *("--block-size", str(BLOCK_TOKENS)),
        *("--kv-events-config", f'{{"enable_kv_cache_events":true,{events}}}'),
        stdout=subprocess.DEVNULL,
    )
    url, mirror = f"http://127.0.0.1:{port}", CacheMirror()
    try:
        await eventually(lambda: answers(url), timeout_seconds=20)
        async with aiohttp.ClientSession() as client, client.get(f"{url}/kv_event_sources") as response:
            (source,) = read_sources(await response.json(), url).values()
        reading = asyncio.create_task(EventReader(source, mirror).run(), name="simulated")
        for prompt in prompts:
            await complete(url, prompt)
        wanted = {each for prompt in prompts for each in chain(prompt)}
        await eventually(lambda: wanted <= mirror.present(), timeout_seconds=20)
        await cancel_and_wait(reading)
        return mirror.present()
    finally:
        process.kill()
        await process.communicate()


async def test_the_mirror_of_a_real_vllm(vllm: str, tmp_path: Path) -> None:
    await eventually(lambda: answers(vllm), timeout_seconds=300, interval_seconds=0.5)
    async with aiohttp.ClientSession() as client, client.get(f"{vllm}/kv_event_sources") as response:
        sources = read_sources(await response.json(), vllm)
    assert set(sources) == {0}
    shared = list(range(10, 80))
    prompts = [[*shared, *range(100 + each, 150 + each)] for each in range(3)]
    for prompt in prompts[:2]:
        await complete(vllm, prompt)
    mirror = CacheMirror("run")
    reading = asyncio.create_task(EventReader(sources[0], mirror).run(), name="reading vLLM")
    try:
        # What came before the reader is replayed, what comes now is heard.
        await complete(vllm, prompts[2])
        wanted = {each for prompt in prompts for each in chain(prompt)}
        await eventually(lambda: wanted <= mirror.present(), timeout_seconds=20)
        assert mirror.complete
        assert mirror.hash_scheme is HashScheme.SHA256_PICKLE
        assert mirror.block_tokens == BLOCK_TOKENS
        assert await simulated(tmp_path, prompts) == wanted == mirror.present()

        # Blocks that make room are gone from the mirror: 23 usable blocks, 12 of them for each prompt.
        for start in range(200, 600, 100):
            await complete(vllm, [start + each % 97 for each in range(12 * BLOCK_TOKENS)])
        last = chain([500 + each % 97 for each in range(12 * BLOCK_TOKENS)])
        await eventually(lambda: last[-1] in mirror.present(), timeout_seconds=20)
        assert mirror.blocks <= 23
        assert not wanted & mirror.present()
        # The hit of a repeated prompt is what the mirror foretells, but for its last token.
        again = await complete(vllm, [500 + each % 97 for each in range(12 * BLOCK_TOKENS)])
        cached = again["usage"]["prompt_tokens_details"]["cached_tokens"]
        assert cached == 11 * BLOCK_TOKENS

        # A cleared cache is told with the next step.
        assert await post(vllm, "/reset_prefix_cache") == {"success": True}
        await complete(vllm, prompts[0])
        await eventually(lambda: mirror.present() == set(chain(prompts[0])), timeout_seconds=20)
        assert mirror.complete
    finally:
        await cancel_and_wait(reading)


async def test_a_salt_sets_blocks_apart_as_the_hash_says(vllm: str) -> None:
    await eventually(lambda: answers(vllm), timeout_seconds=300, interval_seconds=0.5)
    async with aiohttp.ClientSession() as client, client.get(f"{vllm}/kv_event_sources") as response:
        (source,) = read_sources(await response.json(), vllm).values()
    mirror = CacheMirror()
    reading = asyncio.create_task(EventReader(source, mirror).run(), name="reading vLLM")
    prompt = list(range(300, 300 + BLOCK_TOKENS + 1))
    salt = f"tenant-{time.monotonic()}"
    try:
        await complete(vllm, prompt, cache_salt=salt)
        salted = event_hash(block_hash(None, prompt[:BLOCK_TOKENS], (("cache_salt", salt),)))
        await eventually(lambda: salted in mirror.present(), timeout_seconds=20)
        assert chain(prompt)[0] not in mirror.present()
    finally:
        await cancel_and_wait(reading)


async def told(mirror: CacheMirror) -> CacheCopy:
    """What a router knows of a mirror."""
    copy = CacheCopy()
    async for message in follow(mirror, "", 0, progress_seconds=0.0):
        if message.WhichOneof("kind") == "progress":
            break
        copy.apply(message, 0.0)
    return copy


async def test_a_router_foretells_cached_tokens_of_chats_and_texts(vllm: str) -> None:
    await eventually(lambda: answers(vllm), timeout_seconds=300, interval_seconds=0.5)
    async with aiohttp.ClientSession() as client, client.get(f"{vllm}/kv_event_sources") as response:
        (source,) = read_sources(await response.json(), vllm).values()
    assert await post(vllm, "/reset_prefix_cache") == {"success": True}
    mirror = CacheMirror("run")
    reading = asyncio.create_task(EventReader(source, mirror).run(), name="reading vLLM")
    tokenizer = PromptTokenizer(SystemClock(), wait_seconds=30.0)
    endpoint = Endpoint("a", "d", "r", vllm, "tiny", "m", EndpointState.READY, "run", 1, "n")

    async def foretold(route: str, body: dict[str, Any]) -> tuple[int, int]:
        read = await tokenizer.read(body, route, [endpoint], block_tokens={BLOCK_TOKENS})
        assert read is not None
        copy = await told(mirror)
        present = copy.leading_blocks(read.chains[BLOCK_TOKENS]) * BLOCK_TOKENS
        return read.tokens, min(present, read.hit_tokens_max(BLOCK_TOKENS))

    try:
        hits = []
        system = {"role": "system", "content": "You are a patient teacher of mathematics. " * 4}
        chats: list[list[dict[str, str]]] = [[system, {"role": "user", "content": "What is a ring? " * 4}]]
        chats.append([*chats[0], {"role": "assistant", "content": "A set."}, chats[0][1]])
        chats.append([system, {"role": "user", "content": "What is a field?"}])
        bodies: list[tuple[str, dict[str, Any]]] = [
            *(("/v1/chat/completions", {"messages": each}) for each in chats),
            ("/v1/chat/completions", {"messages": chats[2], "cache_salt": "tenant"}),
            ("/v1/chat/completions", {"messages": chats[2], "cache_salt": "tenant"}),
            ("/v1/completions", {"prompt": "Once upon a time there was a mill. " * 8}),
            ("/v1/completions", {"prompt": "Once upon a time there was a mill. " * 10}),
            ("/v1/completions", {"prompt": list(range(30, 30 + 2 * BLOCK_TOKENS))}),
            ("/v1/completions", {"prompt": list(range(30, 30 + 2 * BLOCK_TOKENS))}),
        ]
        for route, body in bodies:
            expected = await foretold(route, body)
            before = mirror.sequence, mirror.epoch
            answer = await post(vllm, route, {"model": "tiny", "max_tokens": 1, "temperature": 0, **body})
            usage = answer["usage"]
            assert expected == (usage["prompt_tokens"], usage["prompt_tokens_details"]["cached_tokens"]), body
            hits.append(expected[1])
            if usage["prompt_tokens"] // BLOCK_TOKENS * BLOCK_TOKENS > expected[1] + BLOCK_TOKENS:
                await eventually(lambda before=before: (mirror.sequence, mirror.epoch) != before)
        assert sum(hit > 0 for hit in hits) >= 5
    finally:
        await cancel_and_wait(reading)
        await tokenizer.close()
