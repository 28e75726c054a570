"""What goes to the client and what is counted, for streams as vLLM 0.32 writes them."""

import json
from collections.abc import Iterable
from typing import Any

import pytest

from router.metering.ask import Asked
from router.metering.stream import CompletionMeter, EventMeter
from router.metering.usage import TokenCounts

ASKED_NOTHING = Asked()
HEAD = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 7, "model": "tiny"}


def event(document: dict[str, Any], end: str = "\n\n") -> bytes:
    return f"data: {json.dumps(document, separators=(',', ':'), ensure_ascii=False)}{end}".encode()


def usage(completion: int) -> dict[str, Any]:
    return {
        "prompt_tokens": 16,
        "total_tokens": 16 + completion,
        "completion_tokens": completion,
        "completion_tokens_details": None,
    }


def chunk(
    text: str, completion: int | None, *, finish: str | None = None, end: str = "\n\n", **more: Any
) -> bytes:
    choice = {"index": 0, "delta": {"content": text}, "logprobs": None, "finish_reason": finish}
    told = {} if completion is None else {"usage": usage(completion)}
    return event({**HEAD, "choices": [choice], **told, **more}, end)


DONE = b"data: [DONE]\n\n"
FINAL = {**HEAD, "choices": [], "usage": {**usage(3), "prompt_tokens_details": {"cached_tokens": 8}}}
FINGERPRINT = {"system_fingerprint": "vllm-0.32.0-5cf25631"}
# What vLLM sends when it is asked for all of its usage, and when it is asked for none.
FULL = [
    chunk("", 0, prompt_token_ids=None, prompt_text=None),
    chunk('a ,"usage":{"prompt_tokens":99} "finish_reason":null', 1),
    chunk("é\n\n}", 2),
    chunk("c", 3, finish="stop"),
    event(FINAL | FINGERPRINT),
    DONE,
]
BARE = [
    chunk("", None, prompt_token_ids=None, prompt_text=None),
    chunk('a ,"usage":{"prompt_tokens":99} "finish_reason":null', None),
    chunk("é\n\n}", None),
    chunk("c", None, finish="stop", **FINGERPRINT),
    DONE,
]
WITH_USAGE = [*BARE[:3], chunk("c", None, finish="stop"), event(FINAL | FINGERPRINT), DONE]


def run(meter: CompletionMeter | EventMeter, pieces: Iterable[bytes]) -> bytes:
    return b"".join([*map(meter.feed, pieces), meter.finish()])


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        pytest.param(ASKED_NOTHING, BARE, id="nothing"),
        pytest.param(Asked(usage=True), WITH_USAGE, id="usage"),
        pytest.param(Asked(usage=True, continuous=True), FULL, id="continuous"),
    ],
)
@pytest.mark.parametrize("size", [1, 7, 100, 10_000, 0])
def test_a_client_gets_what_it_asked_for_and_no_more(asked: Asked, expected: list[bytes], size: int) -> None:
    stream = b"".join(FULL)
    pieces = [stream[at : at + size] for at in range(0, len(stream), size)] if size else FULL
    meter = CompletionMeter(asked, asking=True)
    assert run(meter, pieces) == b"".join(expected)
    assert meter.counts() == TokenCounts(16, 3, 8, exact=True)
    assert meter.ended
    assert not meter.error


def test_every_event_leaves_with_its_piece() -> None:
    meter = CompletionMeter(ASKED_NOTHING, asking=True)
    assert [meter.feed(piece) for piece in FULL[:3]] == BARE[:3]


@pytest.mark.parametrize("end", ["\r\n\r\n", "\r\r", "\n\n"])
@pytest.mark.parametrize("size", [1, 5, 1000])
def test_comments_and_other_line_ends_pass(end: str, size: int) -> None:
    comment = f": keep-alive{end}".encode()
    full = [comment, chunk("a", 1, end=end), comment, chunk("b", 2, finish="stop", end=end), comment]
    full += [event(FINAL, end), comment, f"data: [DONE]{end}".encode()]
    bare = [comment, chunk("a", None, end=end), comment, chunk("b", None, finish="stop", end=end), comment]
    bare += [comment, f"data: [DONE]{end}".encode()]
    stream = b"".join(full)
    meter = CompletionMeter(ASKED_NOTHING, asking=True)
    assert run(meter, [stream[at : at + size] for at in range(0, len(stream), size)]) == b"".join(bare)
    assert meter.counts().completion == 3


def test_a_stream_that_breaks_is_counted_to_its_last_chunk() -> None:
    meter = CompletionMeter(ASKED_NOTHING, asking=True)
    half = FULL[2][:40]
    assert run(meter, [FULL[0], FULL[1], half]) == BARE[0] + BARE[1] + half
    assert meter.counts() == TokenCounts(16, 1, None, exact=True)
    assert not meter.ended


def test_several_choices_and_prompts_are_added_up() -> None:
    def of(index: int, prompt: int, completion: int) -> bytes:
        told = {"prompt_tokens": prompt, "total_tokens": prompt + completion, "completion_tokens": completion}
        choice = {"index": index, "text": "x", "finish_reason": None}
        return event({"choices": [choice], "usage": told})

    pieces = [of(0, 5, 1), of(3, 7, 1), of(1, 5, 1), of(0, 5, 2), of(2, 7, 4)]
    meter = CompletionMeter(Asked(choices=2, prompts=2), asking=True)
    assert b"usage" not in run(meter, pieces)
    assert meter.counts() == TokenCounts(12, 8, None, exact=True)
    early = CompletionMeter(Asked(choices=2, prompts=2), asking=True)
    run(early, pieces[:1])
    assert early.counts() == TokenCounts(5, 1, None, exact=False)


def test_without_continuous_usage_chunks_are_counted_and_not_called_exact() -> None:
    meter = CompletionMeter(ASKED_NOTHING, asking=True)
    run(meter, BARE[:3])
    assert meter.counts() == TokenCounts(None, 3, None, exact=False)


@pytest.mark.parametrize(("code", "is_clients"), [(500, False), (400, True), (None, False), ("x", False)])
def test_an_error_event_is_seen_and_passed_on(code: Any, is_clients: bool) -> None:
    error = event({"error": {"message": "EngineCore encountered an issue.", "code": code}})
    meter = CompletionMeter(ASKED_NOTHING, asking=True)
    assert run(meter, [FULL[0], FULL[1], error + DONE]) == b"".join([*BARE[:2], error, DONE])
    assert meter.error == "EngineCore encountered an issue."
    assert meter.error_is_clients is is_clients
    assert meter.counts() == TokenCounts(16, 1, None, exact=True)


def test_what_is_no_event_passes_and_costs_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("router.openai.events.EVENT_BYTES_MAX", 1000)
    noise = b"data: " + b"x" * 3000
    meter = CompletionMeter(ASKED_NOTHING, asking=True)
    assert meter.feed(FULL[0]) + meter.feed(FULL[3]) + meter.feed(noise[:600]) == BARE[0]
    out = meter.feed(noise[600:])
    assert out == chunk("c", None, finish="stop") + noise
    assert run(meter, [b"\n\n", DONE]) == b"\n\n" + DONE


RESPONSE_USAGE = {
    "input_tokens": 16,
    "input_tokens_details": {"cached_tokens": 4},
    "output_tokens": 5,
    "total_tokens": 21,
}


def named(kind: str, **fields: Any) -> bytes:
    return f"event: {kind}\n".encode() + event({"type": kind, **fields})


@pytest.mark.parametrize("size", [1, 50, 10_000])
def test_responses_tell_usage_at_their_end(size: int) -> None:
    stream = b"".join(
        [
            named("response.created", response={"status": "in_progress", "usage": None}),
            named("response.output_text.delta", delta='"usage"'),
            named("response.output_text.delta", delta="b"),
            named("response.completed", response={"usage": RESPONSE_USAGE, "error": None}),
        ]
    )
    meter = EventMeter()
    assert run(meter, [stream[at : at + size] for at in range(0, len(stream), size)]) == stream
    assert meter.counts() == TokenCounts(16, 5, 4, exact=True)
    assert meter.ended
    assert not meter.error
    left = EventMeter()
    run(left, [stream[: stream.index(b"event: response.completed")]])
    assert left.counts() == TokenCounts(None, 2, None, exact=False)


def test_a_failed_response_is_a_failure() -> None:
    meter = EventMeter()
    run(meter, [named("response.failed", response={"error": {"message": "died"}, "usage": None})])
    assert meter.error == "died"


def test_messages_tell_usage_at_both_ends() -> None:
    start = named("message_start", message={"usage": {"input_tokens": 16, "output_tokens": 0}})
    delta = named("content_block_delta", index=0, delta={"type": "text_delta", "text": "message_stop"})
    told = {"input_tokens": 6, "output_tokens": 5, "cache_read_input_tokens": 10}
    end = named("message_delta", delta={"stop_reason": "end_turn"}, usage=told) + named("message_stop")
    meter = EventMeter()
    run(meter, [start, delta, end])
    assert meter.counts() == TokenCounts(16, 5, 10, exact=True)
    assert meter.ended
    left = EventMeter()
    run(left, [start, delta])
    assert left.counts() == TokenCounts(16, 1, None, exact=False)
    failed = EventMeter()
    run(failed, [start, named("error", error={"type": "overloaded_error", "message": "no room"})])
    assert failed.error == "no room"
