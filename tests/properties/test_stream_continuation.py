"""However an answer is cut and wherever its engines die: the client gets one exact stream."""

import json
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from router.continuation.stream import CONTINUATIONS_MAX, ContinuedStream
from router.metering.ask import Asked
from router.metering.stream import CompletionMeter

PROMPT_TOKENS = 11
# Tokens as models have them: white space before, behind, in between, alone; characters of several bytes.
TOKENS = st.lists(
    st.sampled_from(
        [" the", "mill", " ", "\n", "\n\n", ".\n", "é", "  水", "a b", '"usage":{', "\t", "\\", "}"]
    ),
    min_size=1,
    max_size=12,
)


def dump(document: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(document, separators=(",", ":"), ensure_ascii=False).encode() + b"\n\n"


class Engine:
    """Writes one fixed answer as a deterministic model does: it goes on wherever it is asked to."""

    def __init__(self, tokens: list[str], *, chat: bool) -> None:
        self.tokens = tokens
        self.chat = chat

    def answer(self, document: dict[str, Any], name: str) -> bytes:
        said = document["prompt"].removeprefix("Q") if not self.chat else self._said(document["messages"])
        rest = self._rest(said)[: document["max_tokens"]]
        longer = PROMPT_TOKENS + len(self.tokens) - len(rest)
        head = {"id": name, "object": "chunk", "created": len(name), "model": "m"}

        def event(choices: list[Any], count: int, **more: Any) -> bytes:
            usage = {
                "prompt_tokens": longer,
                "total_tokens": longer + count,
                "completion_tokens": count,
                **more,
            }
            return dump({**head, "choices": choices, "usage": usage})

        def choice(text: str, finish: str | None, **more: str) -> dict[str, Any]:
            shown = {"delta": {**more, "content": text}} if self.chat else {"text": text}
            return {"index": 0, **shown, "logprobs": None, "finish_reason": finish}

        events = [event([choice("", None, role="assistant")], 0)] if self.chat else []
        events += [
            event([choice(text, "length" if number == len(rest) else None)], number)
            for number, text in enumerate(rest, 1)
        ]
        events.append(event([], len(rest), prompt_tokens_details={"cached_tokens": 1}))
        return b"".join([*events, b"data: [DONE]\n\n"])

    def _said(self, messages: list[dict[str, str]]) -> str:
        return messages[-1]["content"] if messages[-1]["role"] == "assistant" else ""

    def _rest(self, said: str) -> list[str]:
        """The tokens behind a text; a token that the text ends within is finished by one of its own."""
        assert said == said.rstrip(), "templates may trim"
        assert "".join(self.tokens).startswith(said)
        length = 0
        for number, token in enumerate(self.tokens):
            if length == len(said):
                return self.tokens[number:]
            if length + len(token) > len(said):
                return [token[len(said) - length :], *self.tokens[number + 1 :]]
            length += len(token)
        return []


def read(stream: bytes) -> list[dict[str, Any]]:
    assert stream.endswith(b"data: [DONE]\n\n")
    events = stream.split(b"\n\n")[:-2]
    return [json.loads(event.removeprefix(b"data: ")) for event in events]


@settings(max_examples=150, deadline=None)
@given(
    tokens=TOKENS,
    chat=st.booleans(),
    usage=st.booleans(),
    deaths=st.lists(st.tuples(st.floats(0, 1), st.booleans()), max_size=CONTINUATIONS_MAX),
    size=st.integers(1, 400),
)
def test_the_client_gets_one_exact_stream(
    tokens: list[str], chat: bool, usage: bool, deaths: list[tuple[float, bool]], size: int
) -> None:
    engine = Engine(tokens, chat=chat)
    asked: dict[str, Any] = {"messages": [{"role": "user", "content": "Q"}]} if chat else {"prompt": "Q"}
    document = {"model": "m", "stream": True, "max_tokens": len(tokens), **asked}
    meter = CompletionMeter(Asked(usage=usage), asking=True)
    joined = ContinuedStream(document, meter)
    out = bytearray()
    request = document
    for number, (share, tells) in enumerate([*deaths, (1.0, False)]):
        answer = engine.answer(request, f"engine-{number}")
        if number < len(deaths):
            answer = answer[: int(share * (len(answer) - 1))]
            if tells:
                answer += b'\n\ndata: {"error":{"message":"died","code":500}}\n\ndata: [DONE]\n\n'
        for at in range(0, len(answer), size):
            out += joined.feed(answer[at : at + size])
        if joined.ended:
            break
        rest = joined.close()
        if rest is not None:
            out += rest
            break
        assert joined.interrupt()
        request = json.loads(joined.next_body())
    events = read(bytes(out))
    choices = [event["choices"][0] for event in events if event["choices"]]
    texts = [(each.get("delta") or each).get("content", each.get("text", "")) for each in choices]
    assert "".join(texts) == "".join(tokens)
    assert [each["finish_reason"] for each in choices if each["finish_reason"]] == ["length"]
    assert len({(event["id"], event["created"]) for event in events}) == 1
    if chat:
        assert ["role" in each["delta"] for each in choices] == [True] + [False] * (len(choices) - 1)
    told = [event["usage"] for event in events if "usage" in event]
    counted = {"prompt_tokens": PROMPT_TOKENS, "completion_tokens": len(tokens)}
    assert [{name: each[name] for name in counted} for each in told] == [counted] * usage
    assert (meter.counts().prompt, meter.counts().completion) == (PROMPT_TOKENS, len(tokens))
    assert meter.counts().exact
    assert not meter.error
