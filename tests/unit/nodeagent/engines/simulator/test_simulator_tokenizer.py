import pytest
from hypothesis import given
from hypothesis import strategies as st

from nodeagent.engines.simulator import tokenizer
from nodeagent.engines.simulator.tokenizer import Echo, decode, echo_behind, encode, render_chat


@given(st.text())
def test_text_survives_the_round_trip(text: str) -> None:
    assert decode(encode(text)) == text


@given(st.text())
def test_ids_are_safe_in_json(text: str) -> None:
    assert all(0 <= token_id < 2**53 for token_id in encode(text))


def test_english_is_about_four_characters_a_token() -> None:
    text = (
        "The scheduler places every replica of a deployment on a node with enough free memory, "
        "and the router sends each request to the replica that will answer it first."
    )
    assert 3.4 < len(text) / len(encode(text)) < 4.6


@given(st.text(), st.integers(1, 200))
def test_an_answer_sent_back_has_the_ids_that_were_generated(text: str, count: int) -> None:
    echo = Echo(text)
    generated = [echo.token_id(index) for index in range(count)]
    # A surrogate or a cut multi-character piece cannot be re-read alone; whole pieces can.
    assert decode(generated) == echo.text(0, count)
    first = {"role": "user", "content": text}
    prompt = render_chat([first])
    answer = {"role": "assistant", "content": echo.text(0, count)}
    second = render_chat([first, answer, {"role": "user", "content": "more"}])
    assert second[: len(prompt)] == prompt
    if text.isascii():
        assert second[len(prompt) : len(prompt) + count] == generated


def test_an_empty_message_is_answered_too() -> None:
    assert Echo("  ").text(0, 3).strip()


def test_special_text_in_a_message_is_no_special_token() -> None:
    rendered = render_chat([{"role": "user", "content": "<|im_end|>"}])
    assert rendered.count(tokenizer.MESSAGE_END) == 1


def test_ids_without_text_are_shown_as_unknown() -> None:
    assert decode([2**50, -1]) == "\ufffd\ufffd"
    assert decode([0]) == "\x00"


def test_a_part_that_is_no_text_is_refused() -> None:
    with pytest.raises(TypeError, match="image_url"):
        render_chat([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}])


@given(st.text(min_size=1, max_size=40), st.integers(0, 30))
def test_a_chat_that_is_gone_on_with_has_the_ids_that_were_generated(text: str, count: int) -> None:
    echo = Echo(text)
    said = echo.text(0, count)
    first = [{"role": "user", "content": text}]
    opened = render_chat([*first, {"role": "assistant", "content": said}], continue_final_message=True)
    assert opened[: len(render_chat(first))] == render_chat(first)
    if text.isascii():
        assert opened[len(render_chat(first)) :] == [echo.token_id(index) for index in range(count)]
        assert echo.offset_behind(said) == count


def test_what_an_answer_does_not_begin_with_is_not_gone_on_with() -> None:
    echo = Echo("one two")
    assert [echo.offset_behind(text) for text in ("", "one", "one tw", "two", "one x")] == [0, 1, 0, 0, 0]


@pytest.mark.parametrize("prompt", ["The mill and\n\n its race", "a b c d", "words words words"])
@pytest.mark.parametrize("count", [3, 20])
def test_a_completion_that_is_gone_on_with_has_the_same_rest(prompt: str, count: int) -> None:
    echo, offset = echo_behind(prompt)
    assert offset == 0 or prompt == "words words words"
    whole = echo.text(offset, offset + 40)
    said = echo.text(offset, offset + count)
    again, behind = echo_behind(prompt + said)
    assert said + again.text(behind, behind + 40 - count) == whole


def test_a_short_prompt_is_no_answer() -> None:
    assert [echo_behind(prompt)[1] for prompt in ("", "aaa", "ab ab")] == [0, 0, 0]
