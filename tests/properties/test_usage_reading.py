"""Usage read from the end of a body, or by whole events, is what reading all of it finds."""

from itertools import pairwise
from typing import Any

import orjson
from hypothesis import given, settings
from hypothesis import strategies as st

from router.metering.ask import Asked
from router.metering.stream import CompletionMeter
from router.metering.usage import UNKNOWN, TokenCounts, counts_of
from router.metering.whole import WholeMeter, usage_at_end

# Names as JSON spells them: the one that is looked for, spelled otherwise, and others that contain it.
NAMES = st.sampled_from(
    ['"usage"', '"us\\u0061ge"', '"x\\"usage"', '"usage\\""', '"x"', '"usages"', '"\\\\"', '"prompt_tokens"']
)
SPACE = st.sampled_from(["", "", "", " ", "\n"])
LEAVES = st.one_of(
    NAMES,
    st.sampled_from(
        ["null", "true", "1", "-1", "1.5", "[]", "{}", '"\\"usage\\":{"', '"}"', '",\\"usage\\":"']
    ),
    st.builds(
        '{{"prompt_tokens":{},"completion_tokens":{},"prompt_tokens_details":{}}}'.format,
        st.integers(0, 9),
        st.sampled_from(["null", "0", "7", "true"]),
        st.sampled_from(["null", '{"cached_tokens":3}', '{"usage":{}}']),
    ),
)


def _object(members: list[tuple[str, str, str]]) -> str:
    return "{" + ",".join(f"{space}{name}{space}:{space}{value}" for name, value, space in members) + "}"


def _members(values: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    return st.lists(st.tuples(NAMES, values, SPACE), max_size=4).map(_object)


VALUES = st.recursive(
    LEAVES,
    lambda inner: _members(inner) | st.lists(inner, max_size=3).map(lambda each: "[" + ",".join(each) + "]"),
    max_leaves=8,
)
BODIES = st.builds(lambda value, space: (value + space).encode(), _members(VALUES) | VALUES, SPACE)


def _parsed(body: bytes) -> TokenCounts:
    document: Any = orjson.loads(body)
    return (counts_of(document.get("usage")) if isinstance(document, dict) else None) or UNKNOWN


@settings(max_examples=1000)
@given(BODIES)
def test_the_end_of_a_body_says_what_the_whole_says(body: bytes) -> None:
    assert usage_at_end(body) in (None, _parsed(body))


@settings(max_examples=300)
@given(BODIES, st.integers(1, 40))
def test_complete_bodies_have_the_usage_that_parsing_finds(body: bytes, size: int) -> None:
    meter = WholeMeter()
    for at in range(0, len(body), size):
        meter.feed(body[at : at + size])
    assert meter.counts_of_complete() == meter.counts() == _parsed(body)


def test_the_end_of_a_chat_answer_is_enough() -> None:
    body = b'{"choices":[{"text":"\\"usage\\""}],"usage":{"prompt_tokens":5,"completion_tokens":2},"kv":null}'
    assert usage_at_end(body) == TokenCounts(5, 2, exact=True)


HEAD = '{"id":"c","object":"chunk","system_fingerprint":"fp",'
USAGE = ',"usage":{"prompt_tokens":5,"total_tokens":6,"completion_tokens":1}'
CHOICE = '"choices":[{"index":0,"delta":{"content":"%s"},"finish_reason":%s}]'
STOP = '"stop"'
EVENTS = st.sampled_from(
    [
        f"data: {HEAD}{CHOICE % ('a', 'null')}{USAGE}}}\n\n",
        f"data: {HEAD}{CHOICE % ('b', 'null')}}}\n\n",
        f"data: {HEAD}{CHOICE % ('c', STOP)}{USAGE}}}\n\n",
        f"data: {HEAD}{CHOICE % ('水', STOP)}}}\n\n",
        f'data: {HEAD}"choices":[]{USAGE}}}\n\n',
        f'data: {{"choices":[]{USAGE},"system_fingerprint":"fp2"}}\n\n',
        'data: {"error":{"message":"no","code":400}}\n\n',
        "data: [DONE]\n\n",
        "data:[DONE]\n\n",
        ": comment\n\n",
        "data: {\n\n",
        "data: [1]\n\n",
        f'data: {HEAD}\ndata: "choices":[]{USAGE}}}\n\n',
        f'data: {HEAD}"choices":[]{USAGE}}}\r\n\r\n',
        f'data: {HEAD}"choices":[]{USAGE}}}\r\r\n\n',
        "\n\n",
    ]
)


@settings(max_examples=500)
@given(
    st.lists(EVENTS, max_size=8),
    st.builds(Asked, usage=st.booleans(), continuous=st.just(value=False), choices=st.sampled_from([1, 2])),
    st.booleans(),
    st.lists(st.integers(0, 900)),
)
def test_a_stream_reads_alike_however_it_is_cut(
    events: list[str], asked: Asked, asking: bool, cuts: list[int]
) -> None:
    stream = "".join(events).encode()
    by_event, cut = CompletionMeter(asked, asking=asking), CompletionMeter(asked, asking=asking)
    whole = b"".join([by_event.feed(each.encode()) for each in events]) + by_event.finish()
    ends = sorted({0, len(stream), *(each for each in cuts if each < len(stream))})
    parts = b"".join([cut.feed(stream[start:end]) for start, end in pairwise(ends)]) + cut.finish()
    assert whole == parts
    assert by_event.counts() == cut.counts()
    assert (by_event.ended, by_event.error) == (cut.ended, cut.error)
