"""Sorting of failures by cause and owner, and the headers that cross the router."""

import pytest
from multidict import CIMultiDict

from router.upstream.failures import AttemptFailed, Cause, Owner, cause_of_answer
from router.upstream.headers import answer_headers, request_headers
from router.wire.headers import RequestHeaders


@pytest.mark.parametrize(
    ("status", "head", "expected"),
    [
        (200, b"{}", None),
        (200, b'data: {"id":"1"}\n\n', None),
        (200, b'data: {"error": {"message": "EngineCore encountered an issue"}}\n\n', Cause.ENGINE_DEAD),
        (200, b'data: {"error": {"message": "bad grammar"}}\n\n', None),
        # What a model writes is no error of its engine.
        (200, b'{"choices":[{"text":"EngineDeadError"}]}', None),
        (400, b"EngineDeadError", None),
        (429, b"", None),
        (500, b"something else", None),
        (500, b'{"error":{"message":"EngineDeadError"}}', Cause.ENGINE_DEAD),
        (500, b"cannot schedule new futures after shutdown", Cause.ENGINE_DRAINING),
        (501, b"", None),
        (502, b"", Cause.ENGINE_UNAVAILABLE),
        (503, b"", Cause.ENGINE_UNAVAILABLE),
        (504, b"", None),
    ],
)
def test_answers_that_mean_the_engine_does_not_serve(
    status: int, head: bytes, expected: Cause | None
) -> None:
    assert cause_of_answer(status, head) is expected


@pytest.mark.parametrize("cause", Cause)
def test_every_cause_has_an_owner_that_is_not_the_client(cause: Cause) -> None:
    failure = AttemptFailed(cause, "detail")
    assert failure.owner in (Owner.ENGINE, Owner.TRANSPORT)
    assert failure.retryable is (cause not in (Cause.FIRST_BYTE_TIMEOUT, Cause.CONTINUATION_REFUSED))


def _request(headers: list[tuple[bytes, bytes]], parent: str = "00-new") -> list[bytes]:
    lines = request_headers(RequestHeaders(headers), request_id="rid", trace_parent=parent)
    assert lines.endswith(b"\r\n")
    return lines.split(b"\r\n")[:-1]


def test_request_headers_lose_credentials_and_what_belongs_to_the_connection() -> None:
    forwarded = _request(
        [
            (b"Authorization", b"Bearer sk-secret"),
            (b"Cookie", b"a=b"),
            (b"X-Api-Key", b"sk-secret"),
            (b"Connection", b"keep-alive, X-Private"),
            (b"X-Private", b"1"),
            (b"Transfer-Encoding", b"chunked"),
            (b"Content-Length", b"3"),
            (b"Host", b"public"),
            (b"Expect", b"100-continue"),
            (b"X-Request-Id", b"theirs"),
            (b"Accept", b"text/event-stream"),
            (b"X-Multi", b"1"),
            (b"X-Multi", b"2"),
            (b"tracestate", b"orphan=1"),
        ]
    )
    assert forwarded == [
        b"Accept: text/event-stream",
        b"X-Multi: 1",
        b"X-Multi: 2",
        b"content-type: application/json",
        b"x-request-id: rid",
        b"traceparent: 00-new",
    ]


def test_a_clients_trace_context_is_kept_whole() -> None:
    forwarded = _request([(b"traceparent", b"00-theirs"), (b"tracestate", b"v=1")], parent="00-theirs")
    assert forwarded.count(b"traceparent: 00-theirs") == 1
    assert forwarded.count(b"tracestate: v=1") == 1


def test_answer_headers_are_a_short_list() -> None:
    engine = {
        "Content-Type": "a/b",
        "Server": "uvicorn",
        "Set-Cookie": "x",
        "Retry-After": "3",
        "Date": "now",
    }
    assert answer_headers(CIMultiDict(engine)) == {"Content-Type": "a/b", "Retry-After": "3"}
