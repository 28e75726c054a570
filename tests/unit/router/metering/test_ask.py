import json
from typing import Any

import orjson
import pytest

from router.metering.ask import CHAT_ROUTE, COMPLETIONS_ROUTE, Asked, ask_usage, read_asked

BODY = b'{ "model":"chat" , "seed": 1.50,"stream":true, "x": "\\u0041" } \n'


def asked_of(body: bytes, *, continuous: bool = True) -> bytes:
    return ask_usage(body, orjson.loads(body), continuous=continuous)


def test_every_other_byte_stays() -> None:
    made = asked_of(BODY)
    added = b',"stream_options":{"include_usage":true,"continuous_usage_stats":true}'
    assert made.replace(added, b"", 1) == BODY
    assert orjson.loads(made)["stream_options"] == {"include_usage": True, "continuous_usage_stats": True}
    assert orjson.loads(asked_of(BODY, continuous=False))["stream_options"] == {"include_usage": True}


@pytest.mark.parametrize(
    "options", ["null", "{}", '{"include_usage":false,"x":[1.50]}', '{"continuous_usage_stats":true}']
)
def test_options_of_the_client_are_kept_beside_ours(options: str) -> None:
    body = b'{"a": 1.50, "stream_options" : %s , "model":"chat"}' % options.encode()
    made = asked_of(body)
    expected = (json.loads(options) or {}) | {"include_usage": True, "continuous_usage_stats": True}
    assert orjson.loads(made) == orjson.loads(body) | {"stream_options": expected}
    assert made.startswith(b'{"a": 1.50, "stream_options" : ')
    assert made.endswith(b' , "model":"chat"}')


def test_a_client_that_asks_for_all_sends_its_own_bytes() -> None:
    body = b'{"stream_options": {"include_usage":true, "continuous_usage_stats":true}}'
    assert asked_of(body) is body


def test_a_doubled_name_is_replaced_twice() -> None:
    body = b'{"stream_options":{"include_usage":false},"stream\\u005foptions":{"include_usage":false}}'
    assert asked_of(body, continuous=False).count(b'{"include_usage":true}') == 2


@pytest.mark.parametrize(
    ("route", "document", "expected"),
    [
        ("/v1/embeddings", {}, None),
        ("/v1/responses", {}, None),
        (CHAT_ROUTE, {}, Asked()),
        (CHAT_ROUTE, {"n": 3}, Asked(choices=3)),
        (CHAT_ROUTE, {"stream_options": None}, Asked()),
        (CHAT_ROUTE, {"stream_options": []}, Asked(readable=False)),
        (CHAT_ROUTE, {"stream_options": {"include_usage": True}}, Asked(usage=True)),
        (CHAT_ROUTE, {"stream_options": {"include_usage": "yes"}}, Asked(readable=False)),
        (CHAT_ROUTE, {"stream_options": {"continuous_usage_stats": True}}, Asked()),
        (
            CHAT_ROUTE,
            {"stream_options": {"include_usage": True, "continuous_usage_stats": True}},
            Asked(usage=True, continuous=True),
        ),
        (COMPLETIONS_ROUTE, {"prompt": "a"}, Asked()),
        (COMPLETIONS_ROUTE, {"prompt": [1, 2]}, Asked()),
        (COMPLETIONS_ROUTE, {"prompt": ["a", "b"], "n": 2}, Asked(choices=2, prompts=2)),
        (COMPLETIONS_ROUTE, {"prompt": [[1], [2], [3]]}, Asked(prompts=3)),
        (COMPLETIONS_ROUTE, {}, Asked(prompts=None)),
        (COMPLETIONS_ROUTE, {"prompt": "a", "use_beam_search": True}, Asked(readable=False)),
    ],
)
def test_what_a_client_wants_is_read(route: str, document: dict[str, Any], expected: Asked | None) -> None:
    assert read_asked(route, document) == expected
