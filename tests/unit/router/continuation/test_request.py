from typing import Any

import orjson
import pytest

from router.continuation.request import continued_body, obstacle, tokens_max

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
MESSAGES = [{"role": "user", "content": "Hi"}]


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({}, ""),
        ({"temperature": 0.7, "seed": 1, "stop": ["x"], "max_tokens": 5, "user": "u"}, ""),
        ({"n": 1, "tools": [], "logprobs": False, "tool_choice": "none"}, ""),
        ({"response_format": {"type": "text"}, "presence_penalty": 0, "add_generation_prompt": True}, ""),
        ({"n": None, "tools": None, "unheard_of": None}, ""),
        ({"n": 2}, "n"),
        ({"logprobs": True}, "logprobs"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"tools": [{}]}, "tools"),
        ({"tool_choice": "auto"}, "tool_choice"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"structured_outputs": {"regex": "a"}}, "structured_outputs"),
        ({"presence_penalty": 0.1}, "presence_penalty"),
        ({"continue_final_message": True}, "continue_final_message"),
        ({"add_generation_prompt": False}, "add_generation_prompt"),
        ({"return_token_ids": True}, "return_token_ids"),
        ({"ignore_eos": True}, "ignore_eos"),
        ({"x" * 100: 1}, "x" * 64),
    ],
)
def test_what_keeps_a_chat_from_being_continued(more: dict[str, Any], expected: str) -> None:
    assert (
        obstacle(CHAT, {"model": "m", "stream": True, "messages": MESSAGES, **more}, stream=True) == expected
    )


@pytest.mark.parametrize(
    ("route", "document", "stream", "expected"),
    [
        (CHAT, {"messages": MESSAGES}, False, "not a stream"),
        ("/v1/responses", {"input": "Hi"}, True, "route"),
        (CHAT, {}, True, "messages"),
        (COMPLETIONS, {"prompt": "Hi"}, True, ""),
        (COMPLETIONS, {"prompt": "Hi", "echo": True}, True, "echo"),
        (COMPLETIONS, {"prompt": ["Hi"]}, True, "prompt"),
        (COMPLETIONS, {"prompt": [1, 2]}, True, "prompt"),
        (COMPLETIONS, {"prompt": "Hi", "suffix": "x"}, True, "suffix"),
    ],
)
def test_routes_and_prompts(route: str, document: dict[str, Any], stream: bool, expected: str) -> None:
    assert obstacle(route, document, stream=stream) == expected


def test_a_chat_goes_on_with_a_message_of_the_assistant() -> None:
    document = {"messages": MESSAGES, "max_tokens": 9, "max_completion_tokens": 8, "min_tokens": 2, "seed": 1}
    assert orjson.loads(continued_body(document, "Hello", 3)) == {
        "messages": [*MESSAGES, {"role": "assistant", "content": "Hello"}],
        "continue_final_message": True,
        "add_generation_prompt": False,
        "max_tokens": 6,
        "max_completion_tokens": 5,
        "min_tokens": 0,
        "seed": 1,
    }
    assert tokens_max(document) == 8
    assert tokens_max({"max_tokens": 9}) == 9
    assert tokens_max({}) is None


def test_a_completion_goes_on_behind_its_prompt() -> None:
    assert orjson.loads(continued_body({"prompt": "Hi "}, "the", 1)) == {"prompt": "Hi the"}


def test_without_a_text_the_request_is_sent_again() -> None:
    document = {"messages": MESSAGES, "max_tokens": 9}
    assert orjson.loads(continued_body(document, "", 0)) == document
