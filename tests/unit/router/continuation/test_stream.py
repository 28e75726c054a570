"""What the properties of a joined stream do not reach: what cannot be continued, and how it then ends."""

import json
from typing import Any

import pytest

from router.continuation.stream import CONTINUATIONS_MAX, ContinuedStream
from router.metering.ask import Asked
from router.metering.stream import CompletionMeter

DOCUMENT: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}], "stream": True}
ERROR = b'data: {"error":{"message":"died","code":500}}\n\n'
DONE = b"data: [DONE]\n\n"


def joined(document: dict[str, Any] = DOCUMENT) -> ContinuedStream:
    return ContinuedStream(document, CompletionMeter(Asked(), asking=True))


def chunk(delta: dict[str, Any], finish: str | None = None, tokens: int = 1) -> bytes:
    usage = {"prompt_tokens": 2, "total_tokens": 2 + tokens, "completion_tokens": tokens}
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    content = json.dumps({"id": "1", "choices": [choice], "usage": usage}, separators=(",", ":"))
    return f"data: {content}\n\n".encode()


@pytest.mark.parametrize("field", ["reasoning", "reasoning_content", "tool_calls"])
def test_an_answer_that_holds_more_than_text_is_not_continued(field: str) -> None:
    stream = joined()
    assert stream.feed(chunk({"content": "a"}))
    assert not stream.lost
    stream.feed(chunk({field: "x"}))
    assert stream.lost
    assert not stream.interrupt()


def test_an_answer_is_continued_so_often_and_no_more() -> None:
    stream = joined()
    assert [stream.interrupt() for _ in range(CONTINUATIONS_MAX + 1)] == [True] * CONTINUATIONS_MAX + [False]


def test_a_long_answer_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("router.continuation.stream.TEXT_CHARACTERS_MAX", 5)
    stream = joined()
    stream.feed(chunk({"content": "123456"}))
    assert stream.lost


def test_an_error_event_is_held_back_and_given_up() -> None:
    stream = joined()
    stream.feed(chunk({"content": "a"}))
    assert stream.feed(ERROR + DONE) == b""
    assert not stream.ended
    assert stream.failure == "died"
    assert stream.give_up() == ERROR + DONE
    assert stream.ended
    assert stream.error == "died"


def test_an_error_of_the_clients_ends_the_stream() -> None:
    error = b'data: {"error":{"message":"no","code":400}}\n\n'
    stream = joined()
    assert stream.feed(error + DONE) == error + DONE
    assert stream.ended
    assert stream.error_is_clients


def test_a_text_that_is_complete_gets_its_end() -> None:
    stream = joined({**DOCUMENT, "max_tokens": 2})
    stream.feed(chunk({"content": "a"}))
    assert stream.close() is None
    stream.feed(chunk({"content": "b"}, tokens=2))
    end = stream.close()
    assert end is not None
    assert b'"finish_reason":"length"' in end
    assert end.endswith(DONE)
    finished = joined()
    out = finished.feed(chunk({"content": "a"}, finish="stop"))
    rest = finished.close()
    assert rest is not None
    assert (out + rest).count(b'"finish_reason":"stop"') == 1
    assert b"usage" not in out + rest
    assert finished.counts().completion == 1


def test_comments_pass_and_cut_events_do_not() -> None:
    stream = joined()
    assert stream.feed(b": keep-alive\n\n") == b": keep-alive\n\n"
    assert stream.feed(b'data: {"id":\n\n') == b""
