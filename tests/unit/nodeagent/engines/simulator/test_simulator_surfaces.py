"""Responses, messages, rankings and continued answers, in vLLM 0.32's shapes."""

import json
from typing import Any

import pytest

from tests.unit.nodeagent.engines.simulator.conftest import Serve, Simulator

MESSAGES = [{"role": "user", "content": "one two three four"}]


async def post(simulator: Simulator, path: str, body: object) -> tuple[int, Any]:
    async with simulator.client.post(f"{simulator.url}{path}", json=body) as response:
        return response.status, await response.json()


async def events(simulator: Simulator, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    """The events of a stream, each of which must be named after its type."""
    async with simulator.client.post(f"{simulator.url}{path}", json={**body, "stream": True}) as response:
        assert response.status == 200
        text = await response.text()
    found = []
    for event in text.removesuffix("\n\n").split("\n\n"):
        name, _, data = event.partition("\n")
        document = json.loads(data.removeprefix("data: "))
        assert name == f"event: {document['type']}"
        found.append(document)
    return found


@pytest.mark.parametrize("stream", [False, True])
async def test_responses_are_remembered_and_gone_on_from(serve: Serve, stream: bool) -> None:
    simulator = await serve()
    body = {"model": "tiny", "input": "one two three", "max_output_tokens": 2, "request_id": "resp_mine"}
    if stream:
        told = await events(simulator, "/v1/responses", body)
        assert [each["sequence_number"] for each in told] == list(range(len(told)))
        assert [each["delta"] for each in told if each["type"].endswith(".delta")] == ["one", " two"]
        assert told[-1]["type"] == "response.completed"
        made = told[-1]["response"]
    else:
        _, made = await post(simulator, "/v1/responses", body)
    assert made["id"] == "resp_mine"
    assert made["output"][0]["content"][0]["text"] == "one two"
    assert made["status"] == "incomplete"
    assert made["usage"]["output_tokens"] == 2
    async with simulator.client.get(f"{simulator.url}/v1/responses/resp_mine") as response:
        assert await response.json() == made
    further = {
        "model": "tiny",
        "input": "more",
        "previous_response_id": "resp_mine",
        "instructions": "be brief",
    }
    _, second = await post(simulator, "/v1/responses", further)
    assert second["usage"]["input_tokens"] > made["usage"]["input_tokens"] + 2
    assert (await post(simulator, "/v1/responses/resp_mine/cancel", {}))[0] == 400


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"model": "tiny"}, 400),
        ({"model": "tiny", "input": "x", "background": True}, 400),
        ({"model": "tiny", "input": "x", "previous_response_id": "no"}, 404),
        ({"model": "no", "input": "x"}, 404),
    ],
)
async def test_responses_that_are_refused(serve: Serve, body: Any, status: int) -> None:
    simulator = await serve()
    assert (await post(simulator, "/v1/responses", body))[0] == status
    async with simulator.client.get(f"{simulator.url}/v1/responses/none") as response:
        assert response.status == 404


async def test_messages_have_anthropics_shape(serve: Serve) -> None:
    simulator = await serve()
    body = {"model": "tiny", "system": "brief", "messages": MESSAGES, "max_tokens": 2}
    _, whole = await post(simulator, "/v1/messages", body)
    assert whole["content"] == [{"type": "text", "text": "one two"}]
    assert whole["stop_reason"] == "max_tokens"
    told = await events(simulator, "/v1/messages", body)
    assert [each["type"] for each in told] == [
        "message_start", "content_block_start", "content_block_delta", "content_block_delta",
        "content_block_stop", "message_delta", "message_stop",
    ]  # fmt: skip
    usage = told[-2]["usage"]
    assert usage["output_tokens"] == 2
    _, counted = await post(simulator, "/v1/messages/count_tokens", body)
    cached = usage["cache_read_input_tokens"]
    assert counted == {"input_tokens": usage["input_tokens"] + cached}
    assert (await post(simulator, "/v1/messages", {"model": "tiny"}))[0] == 400


@pytest.mark.parametrize("route", ["/rerank", "/v1/rerank", "/v2/rerank"])
async def test_rankings(serve: Serve, route: str) -> None:
    simulator = await serve()
    body = {"model": "tiny", "query": "the mill", "documents": ["a bread", "the mill"], "top_n": 1}
    _, ranked = await post(simulator, route, body)
    assert [(each["index"], each["relevance_score"]) for each in ranked["results"]] == [(1, 1.0)]
    assert ranked["usage"]["prompt_tokens"] == 8
    assert (await post(simulator, route, {"model": "tiny", "query": "x"}))[0] == 400


async def test_scores(serve: Serve) -> None:
    simulator = await serve()
    _, scored = await post(simulator, "/score", {"model": "tiny", "text_1": "a", "text_2": ["a", "b"]})
    assert [each["score"] for each in scored["data"]] == [1.0, 0.0]


async def test_an_answer_is_gone_on_with(serve: Serve) -> None:
    simulator = await serve()
    asked = {"model": "tiny", "max_tokens": 6, "messages": MESSAGES}
    _, whole = await post(simulator, "/v1/chat/completions", asked)
    text = whole["choices"][0]["message"]["content"]
    opened = [*MESSAGES, {"role": "assistant", "content": "one two three"}]
    rest = {
        "messages": opened,
        "max_tokens": 3,
        "add_generation_prompt": False,
        "continue_final_message": True,
    }
    _, more = await post(simulator, "/v1/chat/completions", {**asked, **rest})
    assert "one two three" + more["choices"][0]["message"]["content"] == text
    assert more["usage"]["prompt_tokens"] == whole["usage"]["prompt_tokens"] + 3
    status, _ = await post(
        simulator, "/v1/chat/completions", {**asked, **rest, "add_generation_prompt": True}
    )
    assert status == 400
