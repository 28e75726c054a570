from typing import Any

import orjson
import pytest

from router.metering.usage import UNKNOWN, TokenCounts, counts_of
from router.metering.whole import PARSED_BYTES_MAX, TAIL_BYTES, WholeMeter

USAGE = {"prompt_tokens": 5, "completion_tokens": 7, "prompt_tokens_details": {"cached_tokens": 2}}
EXPECTED = TokenCounts(5, 7, 2, exact=True)
LONG = 'x\\"usage\\":{' * (PARSED_BYTES_MAX // 10)


def metered(body: bytes, size: int = 65_536) -> TokenCounts:
    meter = WholeMeter()
    pieces = [body[at : at + size] for at in range(0, len(body), size)]
    assert b"".join(map(meter.feed, pieces)) + meter.finish() == body
    return meter.counts()


@pytest.mark.parametrize(
    "document",
    [
        {"usage": USAGE},
        {"choices": [{"text": '"usage":{"prompt_tokens":9}'}], "usage": USAGE, "kv": None},
        {"choices": [{"usage": {"prompt_tokens": 9}}], "usage": USAGE},
        {"usage": USAGE, "choices": [{"usage": {"prompt_tokens": 9}}]},
        {"data": LONG, "usage": USAGE, "kv_transfer_params": None},
        {"data": LONG, "usage": USAGE, "prompt_logprobs": [{"usage": {"prompt_tokens": 9}}] * 3},
        {"usage": USAGE, "prompt_logprobs": ["y" * 100] * 20_000},
        {"data": LONG, "usage": USAGE, "prompt_logprobs": ["y" * 100] * 20_000},
    ],
    ids="-".join,
)
@pytest.mark.parametrize("pretty", [False, True])
def test_usage_of_any_body(document: dict[str, Any], pretty: bool) -> None:
    assert metered(orjson.dumps(document, option=orjson.OPT_INDENT_2 if pretty else None)) == EXPECTED


def test_what_is_kept_of_a_large_body_is_bounded() -> None:
    meter = WholeMeter()
    for _ in range(100):
        meter.feed(b"z" * 60_000)
    assert sum(map(len, meter._pieces)) <= PARSED_BYTES_MAX + TAIL_BYTES


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[1]", b"{}", b'{"usage":null}', b'{"usage":{"prompt_tokens":-1}}']
)
def test_no_usage_is_unknown(body: bytes) -> None:
    assert metered(body) == UNKNOWN


def test_a_compressed_body_is_not_read() -> None:
    meter = WholeMeter(encoded=True)
    assert meter.feed(b"\x1f\x8b") == b"\x1f\x8b"
    assert meter.counts() == UNKNOWN


@pytest.mark.parametrize(
    ("usage", "expected"),
    [
        ({"prompt_tokens": 3, "total_tokens": 3}, TokenCounts(3, 0, None, exact=True)),
        ({"prompt_tokens": 3, "completion_tokens": None}, TokenCounts(3, None, None, exact=True)),
        ({"input_tokens": 4, "output_tokens": 1}, TokenCounts(4, 1, None, exact=True)),
        (
            {
                "input_tokens": 4,
                "output_tokens": 1,
                "cache_read_input_tokens": 3,
                "cache_creation_input_tokens": 2,
            },
            TokenCounts(9, 1, 3, exact=True),
        ),
        ({"prompt_tokens": True}, None),
        ({"prompt_tokens": 2**60}, None),
        ({"seconds": 3}, None),
        (None, None),
    ],
)
def test_shapes_of_usage(usage: Any, expected: TokenCounts | None) -> None:
    assert counts_of(usage) == expected
