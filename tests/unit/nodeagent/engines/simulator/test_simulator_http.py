import asyncio
import json
import math
import struct
from base64 import b64decode
from typing import Any

import aiohttp
import pytest

from tests.support.waiting import eventually
from tests.unit.nodeagent.engines.simulator.conftest import Serve, Simulator

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "Hello there, you"}]}
SLOW = ("--inter-token-latency-ms", "20")


async def post(simulator: Simulator, path: str, body: object) -> tuple[int, Any]:
    async with simulator.client.post(f"{simulator.url}{path}", json=body) as response:
        return response.status, await response.json()


async def stream(simulator: Simulator, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    """The events of a stream, which must end with [DONE]."""
    async with simulator.client.post(f"{simulator.url}{path}", json={**body, "stream": True}) as response:
        assert response.status == 200
        assert response.content_type == "text/event-stream"
        text = await response.text()
    events = text.removesuffix("\n\n").split("\n\n")
    assert events[-1] == "data: [DONE]"
    assert all(event.startswith("data: ") for event in events)
    return [json.loads(event.removeprefix("data: ")) for event in events[:-1]]


async def test_chat_stream_has_vllms_shape(serve: Serve) -> None:
    simulator = await serve()
    events = await stream(simulator, "/v1/chat/completions", {**CHAT, "max_tokens": 7})
    role, *deltas, finish = events
    assert role["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert len(deltas) == 7
    assert all(event["choices"][0]["finish_reason"] is None for event in [role, *deltas])
    assert finish["choices"][0]["finish_reason"] == "length"
    assert finish["choices"][0]["delta"] == {"content": ""}
    assert {event["object"] for event in events} == {"chat.completion.chunk"}
    assert len({event["id"] for event in events}) == 1
    assert events[0]["id"].startswith("chatcmpl-")
    assert all("usage" not in event for event in events)
    text = "".join(event["choices"][0]["delta"]["content"] for event in deltas)
    assert text == "Hello there, you Hello there,"


@pytest.mark.parametrize("max_tokens", [1, 2, 40])
async def test_usage_counts_the_streamed_deltas(serve: Serve, max_tokens: int) -> None:
    simulator = await serve()
    options = {"include_usage": True, "continuous_usage_stats": True}
    events = await stream(
        simulator,
        "/v1/chat/completions",
        {**CHAT, "max_tokens": max_tokens, "stream_options": options},
    )
    *chunks, last = events
    assert last["choices"] == []
    deltas = [event for event in chunks if event["choices"][0]["delta"].get("content")]
    assert last["usage"]["completion_tokens"] == len(deltas) == max_tokens
    status, answer = await post(simulator, "/v1/chat/completions", {**CHAT, "max_tokens": 1})
    assert status == 200
    assert last["usage"]["prompt_tokens"] == answer["usage"]["prompt_tokens"]
    assert [event["usage"]["completion_tokens"] for event in chunks[1:-1]] == list(range(1, max_tokens + 1))
    total = last["usage"]["prompt_tokens"] + max_tokens
    assert last["usage"]["total_tokens"] == total


async def test_completion_stream_has_vllms_shape(serve: Serve) -> None:
    simulator = await serve()
    body = {"model": "other", "prompt": "one two", "max_tokens": 3}
    events = await stream(simulator, "/v1/completions", body)
    assert [event["choices"][0]["text"] for event in events] == ["one", " two", " one", ""]
    assert events[-1]["choices"][0]["finish_reason"] == "length"
    assert {event["object"] for event in events} == {"text_completion"}
    assert events[0]["id"].startswith("cmpl-")
    assert events[0]["model"] == "tiny"


async def test_answers_without_streaming(serve: Serve) -> None:
    simulator = await serve("--default-output-tokens", "5")
    status, answer = await post(simulator, "/v1/chat/completions", CHAT)
    assert status == 200
    assert answer["object"] == "chat.completion"
    assert answer["choices"][0]["message"]["content"] == "Hello there, you Hello"
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["usage"]["completion_tokens"] == 5
    _, answer = await post(simulator, "/v1/completions", {"model": "tiny", "prompt": [1, 2, 3]})
    assert answer["usage"]["prompt_tokens"] == 3
    body = {**CHAT, "min_tokens": 9, "max_tokens": 9, "ignore_eos": True}
    _, answer = await post(simulator, "/v1/chat/completions", body)
    assert answer["usage"]["completion_tokens"] == 9


async def test_request_id_becomes_the_answers_id(serve: Serve) -> None:
    simulator = await serve()
    async with simulator.client.post(
        f"{simulator.url}/v1/chat/completions", json=CHAT, headers={"X-Request-Id": "abc"}
    ) as response:
        assert (await response.json())["id"] == "chatcmpl-abc"
    _, answer = await post(
        simulator, "/v1/completions", {"model": "tiny", "prompt": "x", "request_id": "def"}
    )
    assert answer["id"] == "cmpl-def"


async def test_small_routes(serve: Serve) -> None:
    simulator = await serve("--max-model-len", "1000")
    client, url = simulator.client, simulator.url
    for path in ("/health", "/ping"):
        async with client.get(url + path) as response:
            assert (response.status, await response.read()) == (200, b"")
    async with client.get(f"{url}/version") as response:
        assert (await response.json())["version"].startswith("0.32.0")
    async with client.get(f"{url}/load") as response:
        assert await response.json() == {"server_load": 0}
    async with client.get(f"{url}/v1/models") as response:
        models = (await response.json())["data"]
    assert [model["id"] for model in models] == ["tiny", "other"]
    assert models[0]["root"] == "/models/tiny"
    assert models[0]["max_model_len"] == 1000
    async with client.get(f"{url}/metrics") as response:
        assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    async with client.get(f"{url}/nothing") as response:
        assert (response.status, await response.json()) == (404, {"detail": "Not Found"})
    async with client.get(f"{url}/v1/completions") as response:
        assert response.status == 405


async def test_tokenize_agrees_with_usage_and_detokenize(serve: Serve) -> None:
    simulator = await serve()
    _, tokens = await post(simulator, "/tokenize", CHAT)
    _, answer = await post(simulator, "/v1/chat/completions", CHAT)
    assert tokens["count"] == len(tokens["tokens"]) == answer["usage"]["prompt_tokens"]
    assert tokens["max_model_len"] == 32_768
    body = {"model": "tiny", "prompt": "a small text", "return_token_strs": True}
    _, tokens = await post(simulator, "/tokenize", body)
    assert tokens["token_strs"] == ["a", " small", " text"]
    _, text = await post(simulator, "/detokenize", {"model": "tiny", "tokens": tokens["tokens"]})
    assert text == {"prompt": "a small text"}


async def test_embeddings_are_unit_vectors_of_the_input_alone(serve: Serve) -> None:
    simulator = await serve()
    body = {"model": "tiny", "input": ["a", "b", "a"]}
    _, answer = await post(simulator, "/v1/embeddings", body)
    first, second, third = (item["embedding"] for item in answer["data"])
    assert first == third != second
    assert len(first) == 32
    assert math.isclose(sum(value * value for value in first), 1.0)
    assert answer["usage"]["prompt_tokens"] == 3
    _, answer = await post(simulator, "/v1/embeddings", {**body, "input": "a", "encoding_format": "base64"})
    packed = struct.unpack("<32f", b64decode(answer["data"][0]["embedding"]))
    assert packed == pytest.approx(first, abs=1e-6)


@pytest.mark.parametrize(
    ("body", "status", "kind", "message"),
    [
        ({**CHAT, "model": "x"}, 404, "NotFoundError", "The model `x` does not exist."),
        ({"model": "tiny"}, 400, "Bad Request", "messages"),
        ({**CHAT, "messages": "x"}, 400, "Bad Request", "messages"),
        ({**CHAT, "messages": [{"content": "x"}]}, 400, "Bad Request", "messages"),
        ({**CHAT, "max_tokens": "x"}, 400, "Bad Request", "max_tokens"),
        ({**CHAT, "max_tokens": 0}, 400, "BadRequestError", "max_tokens must be at least 1"),
        ({**CHAT, "stream": "yes"}, 400, "Bad Request", "stream"),
        ({**CHAT, "stream_options": {"include_usage": True}}, 400, "Bad Request", "stream=True"),
        ({**CHAT, "cache_salt": ""}, 400, "Bad Request", "cache_salt"),
        ({**CHAT, "n": 2}, 400, "BadRequestError", "n must be 1"),
        (
            {**CHAT, "max_tokens": 65},
            400,
            "BadRequestError",
            "max_tokens=65 cannot be greater than max_model_len=max_total_tokens=64.",
        ),
        (
            {**CHAT, "messages": [{"role": "user", "content": "x " * 80}], "stream": True},
            400,
            "BadRequestError",
            "This model's maximum context length is 64 tokens. However, your prompt contains",
        ),
        (
            {**CHAT, "messages": [{"role": "user", "content": "x" * 500}]},
            400,
            "BadRequestError",
            "You passed 500 input characters",
        ),
        ([], 400, "Bad Request", "valid dictionary"),
    ],
)
async def test_refusals_have_vllms_shape(
    serve: Serve, body: object, status: int, kind: str, message: str
) -> None:
    simulator = await serve("--max-model-len", "64")
    got, answer = await post(simulator, "/v1/chat/completions", body)
    assert got == status
    assert set(answer["error"]) == {"message", "type", "param", "code"}
    assert answer["error"]["type"] == kind
    assert answer["error"]["code"] == status
    assert message in answer["error"]["message"]


@pytest.mark.parametrize(
    ("data", "content_type"),
    [(b"{", "application/json"), (b"\xff", "application/json"), (b"{}", "text/plain")],
)
async def test_a_body_that_is_no_json_is_a_400(serve: Serve, data: bytes, content_type: str) -> None:
    simulator = await serve()
    async with simulator.client.post(
        f"{simulator.url}/v1/completions", data=data, headers={"content-type": content_type}
    ) as response:
        assert response.status == 400
        assert (await response.json())["error"]["type"] == "Bad Request"


async def test_output_is_clamped_to_the_context(serve: Serve) -> None:
    simulator = await serve("--max-model-len", "64")
    body = {"model": "tiny", "prompt": list(range(1, 51)), "max_tokens": 60}
    _, answer = await post(simulator, "/v1/completions", body)
    assert answer["usage"]["completion_tokens"] == 14
    assert answer["choices"][0]["finish_reason"] == "length"


async def test_a_second_turn_hits_the_first_ones_prompt_and_answer(serve: Serve) -> None:
    simulator = await serve("--enable-prompt-tokens-details")
    question = {"role": "user", "content": "tell me a rather long story about mills " * 5}
    body = {"model": "tiny", "messages": [question], "max_tokens": 40}
    _, answer = await post(simulator, "/v1/chat/completions", body)
    assert answer["usage"]["prompt_tokens_details"] == {"cached_tokens": 0}
    computed = answer["usage"]["total_tokens"] - 1
    messages = [
        question,
        answer["choices"][0]["message"],
        {"role": "user", "content": "go on"},
    ]
    _, second = await post(simulator, "/v1/chat/completions", {"model": "tiny", "messages": messages})
    cached = second["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert cached == computed // 16 * 16
    assert await simulator.metric("vllm:prefix_cache_hits_total") == cached
    queries = answer["usage"]["prompt_tokens"] + second["usage"]["prompt_tokens"]
    assert await simulator.metric("vllm:prefix_cache_queries_total") == queries


@pytest.mark.parametrize("streaming", [True, False])
async def test_a_client_that_leaves_frees_its_place(serve: Serve, streaming: bool) -> None:
    simulator = await serve(*SLOW)
    body = {**CHAT, "max_tokens": 5000, "stream": streaming}

    async def ask() -> None:
        async with simulator.client.post(f"{simulator.url}/v1/chat/completions", json=body) as response:
            await response.read()

    asking = asyncio.create_task(ask())
    await eventually(lambda: simulator.model.running_count == 1)
    await eventually(lambda: _is(simulator, "vllm:num_requests_running", 1))
    assert await simulator.metric("vllm:kv_cache_usage_perc") > 0
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    await eventually(lambda: simulator.engine.active_requests == 0)
    assert simulator.model.pool.held_blocks == 0
    assert await simulator.metric("vllm:num_requests_running") == 0
    assert await simulator.metric("vllm:kv_cache_usage_perc") == 0
    for reason in ("length", "stop", "abort"):
        labels = f'{{engine="0",finished_reason="{reason}",'
        assert await simulator.metric(f"vllm:request_success_total{labels}") == 0
    assert await simulator.metric("vllm:e2e_request_latency_seconds_count") == 0


async def _is(simulator: Simulator, name: str, value: float) -> bool:
    return await simulator.metric(name) == value


async def test_more_than_the_batch_waits_and_is_served(serve: Serve) -> None:
    simulator = await serve(*SLOW, "--max-num-seqs", "2")
    body = {**CHAT, "max_tokens": 5}
    asking = [asyncio.create_task(post(simulator, "/v1/chat/completions", body)) for _ in range(5)]
    await eventually(lambda: _is(simulator, "vllm:num_requests_waiting{", 3))
    assert await simulator.metric("vllm:num_requests_running") == 2
    answers = await asyncio.gather(*asking)
    assert {status for status, _ in answers} == {200}


async def test_requests_in_one_connection_are_answered_in_order(serve: Serve) -> None:
    simulator = await serve()
    host, port = simulator.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    chunked = b'3\r\n{"m\r\nc\r\nodel":"tiny"\r\n18\r\n,"prompt":[1],"n":1    }\r\n0\r\n\r\n'
    writer.write(
        b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        b"transfer-encoding: chunked\r\n\r\n" + chunked + b"GET /version HTTP/1.1\r\nhost: x\r\n"
        b"connection: close\r\n\r\n"
    )
    async with asyncio.timeout(5):
        text = (await reader.read()).decode()
    writer.close()
    await writer.wait_closed()
    assert text.count("HTTP/1.1 200 OK") == 2
    assert text.index("text_completion") < text.index("0.32.0")


async def test_bytes_that_are_no_request_get_a_400(serve: Serve) -> None:
    simulator = await serve()
    host, port = simulator.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(b"nonsense\r\n\r\n")
    async with asyncio.timeout(5):
        assert (await reader.read()).startswith(b"HTTP/1.1 400 Bad Request")
    writer.close()
    await writer.wait_closed()


async def test_never_ready_refuses_health_and_inference(serve: Serve) -> None:
    simulator = await serve("--never-ready")
    async with simulator.client.get(f"{simulator.url}/health") as response:
        assert response.status == 503
    status, answer = await post(simulator, "/v1/chat/completions", CHAT)
    assert (status, answer["error"]["code"]) == (503, 503)


async def test_stall_answers_some_and_then_nobody(serve: Serve) -> None:
    simulator = await serve("--stall-after-requests", "1")
    assert (await post(simulator, "/v1/chat/completions", CHAT))[0] == 200
    with pytest.raises(TimeoutError):
        async with simulator.client.post(
            f"{simulator.url}/v1/chat/completions",
            json=CHAT,
            timeout=aiohttp.ClientTimeout(total=0.15),
        ):
            pass
    async with simulator.client.get(f"{simulator.url}/health") as response:
        assert response.status == 200


async def test_a_dying_engine_tells_its_streams_and_refuses_the_rest(serve: Serve) -> None:
    simulator = await serve("--mid-stream-death-after-tokens", "3")
    *deltas, error = await stream(simulator, "/v1/chat/completions", CHAT)
    assert len(deltas) == 4
    assert error["error"]["code"] == 500
    assert "EngineCore" in error["error"]["message"]
    status, answer = await post(simulator, "/v1/chat/completions", CHAT)
    assert status == 500
    assert answer["error"]["message"] == error["error"]["message"]
    async with simulator.client.get(f"{simulator.url}/health") as response:
        assert response.status == 503


async def test_draining_refuses_new_requests_as_vllm_does(serve: Serve) -> None:
    simulator = await serve()
    simulator.api.draining = True
    status, answer = await post(simulator, "/v1/chat/completions", CHAT)
    assert status == 500
    assert "after shutdown" in answer["error"]["message"]
