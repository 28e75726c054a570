"""Reading a body, and renaming its model without touching the rest."""

import json
import sys
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.openai.body import ParsedBody, parse_body, rename_model
from router.openai.errors import Reason, Refusal

_text = st.text(st.characters(codec="utf-8"))
_numbers = st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False)
_scalars = st.none() | st.booleans() | _numbers | _text
_values = st.recursive(
    _scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_text, inner, max_size=3),
    max_leaves=8,
)


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b'{"model":"a"}', ParsedBody("a", False)),
        (b'{"model":"a","stream":true}', ParsedBody("a", True)),
        (b'{"model":"a","stream":null}', ParsedBody("a", False)),
        ('{"model":"\u00e9/\\u0041"}'.encode(), ParsedBody("\u00e9/A", False)),
    ],
)
def test_parse(body: bytes, expected: ParsedBody) -> None:
    assert parse_body(body) == expected


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"", Reason.BODY_MALFORMED),
        (b"null", Reason.BODY_MALFORMED),
        (b'{"model":"a"', Reason.BODY_MALFORMED),
        (b'{"model":"a"}{}', Reason.BODY_MALFORMED),
        (b'{"model":NaN}', Reason.BODY_MALFORMED),
        (b"[" * 100_000, Reason.BODY_MALFORMED),
        (b'{"model":null}', Reason.MODEL_MISSING),
        (b'{"model":["a"]}', Reason.PARAMETER_INVALID),
        (b'{"model":"a","stream":1}', Reason.PARAMETER_INVALID),
    ],
)
def test_parse_refuses(body: bytes, reason: Reason) -> None:
    with pytest.raises(Refusal) as refused:
        parse_body(body)
    assert refused.value.why is reason
    assert refused.value.status == 400


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b'{"model":"a"}', b'{"model":"b"}'),
        (
            b' {\n"x" : [1, {"model":"a"}] , "model"\t: "a" }\n',
            b' {\n"x" : [1, {"model":"a"}] , "model"\t: "b" }\n',
        ),
        (b'{"mod\\u0065l":"a","y":1e9}', b'{"mod\\u0065l":"b","y":1e9}'),
        (b'{"model":"a","model":"z"}', b'{"model":"b","model":"b"}'),
        (b'{"n":%s,"model":"a"}' % (b"9" * 5000), b'{"n":%s,"model":"b"}' % (b"9" * 5000)),
        ('{"é":"\\"}{","model":"a"}'.encode(), '{"é":"\\"}{","model":"b"}'.encode()),
    ],
)
def test_rename_touches_the_model_only(body: bytes, expected: bytes) -> None:
    assert rename_model(body, "b") == expected


@given(
    st.dictionaries(_text, _values, max_size=5),
    st.text(st.characters(codec="utf-8"), min_size=1),
    st.integers(0, 5),
    st.sampled_from([None, 1, "\t"]),
)
def test_rename_keeps_every_other_value(document: dict[str, Any], name: str, place: int, indent: Any) -> None:
    members = [(key, value) for key, value in document.items() if key != "model"]
    members.insert(place, ("model", "before"))
    body = json.dumps(dict(members), indent=indent).encode()
    renamed = rename_model(body, name)
    assert orjson.loads(renamed) == {**orjson.loads(body), "model": name}
    assert rename_model(renamed, "before") == body


def test_rename_refuses_what_is_nested_too_deeply_to_be_walked() -> None:
    depth = sys.getrecursionlimit() + 10
    deep = b'{"a":' + b"[" * depth + b"]" * depth + b',"model":"a"}'
    with pytest.raises(Refusal) as refused:
        rename_model(deep, "b")
    assert refused.value.why is Reason.BODY_MALFORMED
