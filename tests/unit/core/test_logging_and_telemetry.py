"""Log lines hold what they should and no secret; request and trace ids are checked."""

import io
import json
import logging
from collections.abc import Iterator
from contextlib import redirect_stderr

import pytest
import structlog

from core.logging import configure
from core.telemetry import new_trace_parent, request_id_of, trace_id_of


@pytest.fixture(autouse=True)
def restore() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    structlog.reset_defaults()
    structlog.contextvars.clear_contextvars()


def test_a_line_is_json_with_the_agreed_fields_and_masked_secrets() -> None:
    output = io.StringIO()
    with redirect_stderr(output):
        configure(service="router", style="json")
        structlog.get_logger("t").info(
            "request served", request_id="r", api_key="sk-1", prompt_tokens=3, authorization="Bearer x"
        )
    line = json.loads(output.getvalue())
    assert line["message"] == "request served"
    assert line["level"] == "info"
    assert line["service"] == "router"
    assert line["time"].endswith("Z")
    assert line["version"]
    assert (line["api_key"], line["authorization"], line["prompt_tokens"]) == ("***", "***", 3)


@pytest.mark.parametrize("given", ["", "a b", 'x"y', "z" * 129, "new\nline"])
def test_malformed_request_ids_are_replaced(given: str) -> None:
    made = request_id_of({"x-request-id": given})
    assert made != given
    assert len(made) == 32


def test_a_proper_request_id_is_kept() -> None:
    assert request_id_of({"x-request-id": "abc-1"}) == "abc-1"


def test_trace_context() -> None:
    parent = new_trace_parent()
    trace = trace_id_of({"traceparent": parent})
    assert trace is not None
    assert trace_id_of({"traceparent": new_trace_parent(trace)}) == trace
    assert trace_id_of({"traceparent": f"00-{'0' * 32}-{'1' * 16}-01"}) is None
    assert trace_id_of({"traceparent": "nonsense"}) is None
