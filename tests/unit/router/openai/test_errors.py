"""Every refusal has OpenAI's shape and a reason of the closed set."""

import orjson
import pytest

from router.openai import errors, sse
from router.openai.errors import Refusal

REFUSALS = [
    errors.api_key_missing(),
    errors.api_key_invalid(),
    errors.body_malformed("it is empty"),
    errors.body_too_large(10),
    errors.body_timeout(1.5),
    errors.body_encoded("gzip"),
    errors.model_missing(),
    errors.parameter_invalid("stream", "a boolean"),
    errors.model_not_found("m" * 10_000),
    errors.model_ambiguous("m", tuple(f"d{n}" for n in range(50))),
    errors.route_unknown("GET", "/" + "x" * 10_000, ("GET /a",)),
    errors.method_not_allowed("GET", "/v1/completions", ("POST",)),
    errors.view_not_synced(),
    errors.router_overloaded(3),
    errors.no_endpoint("m", {"DRAINING": 2}),
    errors.no_endpoint("m", {}),
    errors.all_endpoints_failed("m", 3, "connect_refused"),
    errors.retry_budget_exhausted("m", "disconnected"),
    errors.first_byte_timeout(120),
    errors.connect_timeout(2),
    errors.internal_error(),
]


@pytest.mark.parametrize("refusal", REFUSALS, ids=lambda each: each.why.value)
def test_shape(refusal: Refusal) -> None:
    error = orjson.loads(refusal.body())["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert len(error["message"]) < 600
    assert error["code"]
    assert error["type"] == ("invalid_request_error" if refusal.status < 500 else "server_error")
    assert ("Retry-After" in refusal.headers) == (refusal.status == 503 or refusal.why == "connect_timeout")
    assert ("WWW-Authenticate" in refusal.headers) == (refusal.status == 401)


@pytest.mark.parametrize(
    ("tail", "separator"), [(b"", b""), (b"\n\n", b""), (b"x", b"\n\n"), (b"}\n", b"\n\n")]
)
def test_broken_stream_ends_with_an_error_event_and_done(tail: bytes, separator: bytes) -> None:
    end = sse.closing_error("broke", code="upstream_error", tail=tail)
    assert end.startswith(separator + b'data: {"error"')
    event, done, rest = end.removeprefix(separator).split(b"\n\n")
    assert orjson.loads(event.removeprefix(b"data: "))["error"]["code"] == "upstream_error"
    assert (done, rest) == (b"data: [DONE]", b"")


@pytest.mark.parametrize(
    ("content_type", "expected"),
    [("text/event-stream", True), ("Text/Event-Stream; charset=utf-8", True), ("application/json", False)],
)
def test_event_streams_are_recognised(content_type: str, expected: bool) -> None:
    assert sse.is_event_stream(content_type) is expected
