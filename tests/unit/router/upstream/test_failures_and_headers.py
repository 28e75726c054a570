"""Sorting of failures by cause and owner, and the headers that cross the router."""

import pytest
from multidict import CIMultiDict, CIMultiDictProxy

from router.upstream.failures import AttemptFailed, Cause, Owner, cause_of_answer
from router.upstream.headers import answer_headers, request_headers


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
    assert failure.retryable is (cause is not Cause.FIRST_BYTE_TIMEOUT)


def _request(headers: list[tuple[str, str]], parent: str = "00-new") -> CIMultiDict[str]:
    return request_headers(CIMultiDictProxy(CIMultiDict(headers)), request_id="rid", trace_parent=parent)


def test_request_headers_lose_credentials_and_what_belongs_to_the_connection() -> None:
    forwarded = _request(
        [
            ("Authorization", "Bearer sk-secret"),
            ("Cookie", "a=b"),
            ("X-Api-Key", "sk-secret"),
            ("Connection", "keep-alive, X-Private"),
            ("X-Private", "1"),
            ("Transfer-Encoding", "chunked"),
            ("Content-Length", "3"),
            ("Host", "public"),
            ("Expect", "100-continue"),
            ("X-Request-Id", "theirs"),
            ("Accept", "text/event-stream"),
            ("X-Multi", "1"),
            ("X-Multi", "2"),
            ("tracestate", "orphan=1"),
        ]
    )
    assert sorted(forwarded.items()) == sorted(
        [
            ("Accept", "text/event-stream"),
            ("X-Multi", "1"),
            ("X-Multi", "2"),
            ("Content-Type", "application/json"),
            ("x-request-id", "rid"),
            ("traceparent", "00-new"),
        ]
    )


def test_a_clients_trace_context_is_kept_whole() -> None:
    forwarded = _request([("traceparent", "00-theirs"), ("tracestate", "v=1")], parent="00-theirs")
    assert forwarded.getall("traceparent") == ["00-theirs"]
    assert forwarded["tracestate"] == "v=1"


def test_answer_headers_are_a_short_list() -> None:
    engine = {
        "Content-Type": "a/b",
        "Server": "uvicorn",
        "Set-Cookie": "x",
        "Retry-After": "3",
        "Date": "now",
    }
    kept = answer_headers(CIMultiDict(engine), replica="r-1")
    assert dict(kept) == {"Content-Type": "a/b", "Retry-After": "3", "x-millrace-endpoint": "r-1"}
