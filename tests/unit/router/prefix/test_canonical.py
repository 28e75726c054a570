"""The canonical prompt: equal prompts begin equally, and nothing in a body makes it fail."""

from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.prefix import canonical
from router.prefix.chain import BLOCKS_MAX, BYTES_PER_TOKEN, GRAIN_TOKENS
from router.prefix.prompt import read_prompt

SYSTEM = {"role": "system", "content": "You are kind."}
USER = {"role": "user", "content": "Hello"}
MEBIBYTE = 1024 * 1024


def canonical_prompt(document: dict[str, Any]) -> bytes:
    text, length_bytes = canonical.canonical_prompt(document, bytes_max=MEBIBYTE)
    assert len(text) == length_bytes
    return text


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"messages": [USER]}, {"messages": [{"content": "Hello", "role": "user"}], "temperature": 1}),
        (
            {"messages": [USER]},
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}]},
        ),
        ({"prompt": "Hello"}, {"prompt": ["Hello"]}),
        ({"prompt": [1, 2]}, {"prompt": [[1, 2]]}),
        ({"tools": [{"a": 1, "b": 2}], "messages": []}, {"tools": [{"b": 2, "a": 1}], "messages": []}),
    ],
)
def test_equal_prompts_are_equal(first: dict[str, Any], second: dict[str, Any]) -> None:
    assert canonical_prompt(first) == canonical_prompt(second) != b""


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"messages": [SYSTEM, USER]}, {"messages": [USER, SYSTEM]}),
        ({"messages": [USER]}, {"messages": [{"role": "system", "content": "Hello"}]}),
        ({"messages": [USER]}, {"messages": [USER], "tools": [{"name": "f"}]}),
        ({"prompt": [1, 2]}, {"prompt": [2, 1]}),
    ],
)
def test_different_prompts_differ(first: dict[str, Any], second: dict[str, Any]) -> None:
    assert canonical_prompt(first) != canonical_prompt(second)


def test_a_later_turn_begins_with_the_earlier_one() -> None:
    answer = {"role": "assistant", "content": "Hi"}
    turn = canonical_prompt({"messages": [SYSTEM, USER]})
    assert canonical_prompt({"messages": [SYSTEM, USER, answer, USER]}).startswith(turn)


def test_token_ids_take_four_bytes_each() -> None:
    assert len(canonical_prompt({"prompt": [1, 2, 3]})) == 12
    assert read_prompt({"prompt": list(range(40))}, namespace="a", deployment="d").tokens == 40


_json = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=10,
)


@settings(deadline=None)
@given(
    st.dictionaries(st.sampled_from(["messages", "prompt", "input", "tools", "cache_salt"]), _json),
    st.lists(st.dictionaries(st.sampled_from(["role", "content", "tool_calls"]), _json) | _json, max_size=3),
)
def test_no_body_makes_it_fail(document: dict[str, Any], messages: list[Any]) -> None:
    read_prompt(document, namespace="a", deployment="d")
    read_prompt({**document, "messages": messages}, namespace="a", deployment="d")


def test_deep_nesting_is_no_prompt() -> None:
    deep = orjson.loads("[" * 900 + "]" * 900)
    for document in ({"messages": [deep]}, {"prompt": deep}, {"tools": deep, "messages": [USER]}):
        canonical_prompt(document)


@settings(deadline=None)
@given(st.text(max_size=300), st.integers(1, 300))
def test_of_a_long_prompt_only_the_beginning_is_made(text: str, bytes_max: int) -> None:
    for document in ({"prompt": text}, {"messages": [SYSTEM, {"role": "user", "content": text}]}):
        whole = canonical_prompt(document)
        beginning, length_bytes = canonical.canonical_prompt(document, bytes_max=bytes_max)
        assert whole.startswith(beginning)
        assert min(len(whole), bytes_max) <= len(beginning) <= max(4 * bytes_max, len(whole))
        assert len(beginning) <= length_bytes <= 4 * len(whole)
    tokens = list(range(len(text)))
    beginning, length_bytes = canonical.canonical_prompt({"prompt": tokens}, bytes_max=bytes_max)
    assert canonical_prompt({"prompt": tokens}).startswith(beginning)
    assert length_bytes == 4 * len(tokens)


def test_a_long_prompt_counts_whole_and_hashes_its_beginning() -> None:
    characters = 3 * BLOCKS_MAX * GRAIN_TOKENS * BYTES_PER_TOKEN
    prompt = read_prompt({"prompt": "x" * characters}, namespace="a", deployment="d")
    assert prompt.tokens == characters // BYTES_PER_TOKEN
    assert len(prompt.chain) == BLOCKS_MAX


def test_an_image_counts_by_what_it_is_and_not_by_its_length() -> None:
    def of(data: str) -> bytes:
        image = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + data}}
        return canonical_prompt({"messages": [{"role": "user", "content": [image]}]})

    assert of("A" * MEBIBYTE) != of("A" * (MEBIBYTE - 1) + "B")
    assert len(of("A" * MEBIBYTE)) < 200
