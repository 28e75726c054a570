"""Whatever clients write into a request, its line in the log is the JSON that a serialiser would write."""

import logging
from datetime import UTC, datetime, timedelta
from typing import Any

import orjson
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from router.access_log import AccessLog, milliseconds
from router.metering.usage import TokenCounts
from router.openai.errors import Reason
from router.record import RequestRecord
from router.view.view import Tier

# Names that come again, and all that JSON has to escape.
TEXTS = st.one_of(
    st.sampled_from(["", "chat", 'a"b', "\\", "\x00\x1f\x7f\n", "水é", "\u2028", "0" * 32]),
    st.text(max_size=300),
)
SECONDS = st.floats(min_value=0, max_value=1e6)
TOKENS = st.none() | st.integers(min_value=0, max_value=2**48)
TIMES = ("duration_ms", "first_byte_ms", "queue_ms")


@st.composite
def records(draw: st.DrawFn) -> RequestRecord:
    method, route, request_id, trace_id, namespace = (draw(TEXTS) for _ in range(5))
    record = RequestRecord(
        request_id, trace_id, "p", method, route, 1.0, namespace=namespace, tier=draw(st.sampled_from(Tier))
    )
    record.model, record.deployment, record.endpoint = draw(TEXTS), draw(TEXTS), draw(TEXTS)
    record.node, record.why = draw(TEXTS), draw(TEXTS)
    record.attempts, record.status = draw(st.integers(0, 5)), draw(st.integers(0, 599))
    record.stream, record.reason = draw(st.booleans()), draw(st.sampled_from(Reason))
    record.first_byte_seconds, record.queue_seconds = draw(st.none() | SECONDS), draw(SECONDS)
    record.counts = TokenCounts(draw(TOKENS), draw(TOKENS), draw(TOKENS), exact=True)
    return record


@settings(max_examples=300)
@given(record=records(), duration_seconds=SECONDS)
def test_a_line_is_what_a_serialiser_writes(record: RequestRecord, duration_seconds: float) -> None:
    # The second time from pieces that are kept.
    for _ in range(2):
        found = orjson.loads(record.line(duration_seconds) + "}")
        expected = orjson.loads(orjson.dumps(record.fields(duration_seconds)))
        assert list(found) == list(expected)
        for name in TIMES:
            assert _nearly(found.pop(name), expected.pop(name))
        assert found == expected


def _nearly(one: float | None, other: float | None) -> bool:
    """Both are to the microsecond; what lies between two of them may go to either."""
    if one is None or other is None:
        return one is other
    return abs(one - other) < 0.00101


@given(SECONDS)
def test_times_are_to_the_nearest_microsecond(seconds: float) -> None:
    assert abs(float(milliseconds(seconds)) - seconds * 1000) <= 0.000501


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=20)
@given(record=records(), quiet=st.booleans())
async def test_a_written_line_has_all_that_every_line_has(
    record: RequestRecord, quiet: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("router.access_log.json_fields", lambda: {"service": "router", "version": "1"})
    level = logging.getLogger("router.access").level
    logging.getLogger("router.access").setLevel(logging.DEBUG)
    try:
        log = AccessLog()
        log.add(record.line(0.5), quiet=quiet)
        log.flush()
        logging.getLogger("router.access").setLevel(logging.WARNING)
        silent = AccessLog()
        silent.add(record.line(0.5), quiet=quiet)
        silent.flush()
    finally:
        logging.getLogger("router.access").setLevel(level)
    text = capsys.readouterr().err
    assert text.endswith("}\n")
    (line,) = text.removesuffix("\n").split("\n")
    found: dict[str, Any] = orjson.loads(line)
    assert list(found)[-5:] == ["level", "time", "service", "version", "message"]
    assert (found["level"], found["message"]) == ("debug" if quiet else "info", "request")
    written = datetime.strptime(found["time"], "%Y-%m-%dT%H:%M:%S.%fZ").replace(tzinfo=UTC)
    assert abs(datetime.now(UTC) - written) < timedelta(hours=1)
