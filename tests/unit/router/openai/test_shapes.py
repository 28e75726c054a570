import orjson
import pytest

from router.openai import errors
from router.openai.routes import INFERENCE_ROUTES, Shape, shape_of
from router.openai.shapes import TRANSLATED_BYTES_MAX, ErrorTranslator, refusal_body, translated

OPENAI_ERROR = b'{"error":{"message":"no","type":"Bad Request","param":null,"code":400}}'


@pytest.mark.parametrize(
    ("path", "shape"),
    [
        ("/v1/chat/completions", Shape.OPENAI),
        ("/v1/messages", Shape.ANTHROPIC),
        ("/v1/messages/count_tokens", Shape.ANTHROPIC),
        ("/v1/responses", Shape.RESPONSES),
        ("/v1/responses/{response_id}", Shape.RESPONSES),
        ("other", Shape.OPENAI),
    ],
)
def test_shapes_of_routes(path: str, shape: Shape) -> None:
    assert shape_of(path) is shape


def test_every_route_is_listed_under_its_own_path() -> None:
    assert all(path == route.path for path, route in INFERENCE_ROUTES.items())


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (OPENAI_ERROR, "no"),
        (b'{"type":"error","error":{"type":"NotFoundError","message":"gone"}}', "gone"),
        (b'{"detail":"Not Found"}', "Not Found"),
        (b'{"error":"Unauthorized"}', "Unauthorized"),
    ],
)
def test_engines_errors_are_translated_for_anthropics_clients(body: bytes, message: str) -> None:
    assert orjson.loads(translated(Shape.ANTHROPIC, 404, body, "rid")) == {
        "type": "error",
        "error": {"type": "not_found_error", "message": message},
        "request_id": "rid",
    }
    assert translated(Shape.OPENAI, 404, body, "rid") is body


@pytest.mark.parametrize("body", [b"", b"<html>", b"[]", b"{}", b'{"error":{"message":7}}'])
def test_what_has_no_message_stays(body: bytes) -> None:
    assert translated(Shape.ANTHROPIC, 500, body, "rid") is body


def test_a_translator_takes_pieces_and_lets_go_of_what_is_too_long() -> None:
    translator = ErrorTranslator(Shape.ANTHROPIC, 400, "")
    assert translator.feed(OPENAI_ERROR[:9]) + translator.feed(OPENAI_ERROR[9:]) == b""
    assert orjson.loads(translator.finish())["error"]["type"] == "invalid_request_error"
    long = ErrorTranslator(Shape.ANTHROPIC, 400, "")
    assert long.feed(b"x" * TRANSLATED_BYTES_MAX) == b""
    assert long.feed(b"y") == b"x" * TRANSLATED_BYTES_MAX + b"y"
    assert long.feed(b"z") == b"z"
    assert long.finish() == b""


@pytest.mark.parametrize(
    ("refusal", "kind"),
    [
        (errors.api_key_missing(), "authentication_error"),
        (errors.model_not_found("m"), "not_found_error"),
        (errors.body_too_large(1), "request_too_large"),
        (errors.view_not_synced(), "overloaded_error"),
        (errors.internal_error(), "api_error"),
        (errors.first_byte_timeout(1), "api_error"),
        (errors.body_encoded("gzip"), "invalid_request_error"),
    ],
)
def test_refusals(refusal: errors.Refusal, kind: str) -> None:
    made = orjson.loads(refusal_body(refusal, Shape.ANTHROPIC, "rid"))
    assert made["error"] == {"type": kind, "message": refusal.message}
    assert refusal_body(refusal, Shape.OPENAI, "rid") == refusal.body()
