"""The ring of decisions keeps the latest ones, as many as its two bounds allow, and no others."""

from collections import deque
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from router.decisions.log import DecisionLog, Step
from router.picking.registry import build_strategy
from router.record import RequestRecord
from tests.support.candidates import request

DECISIONS_MAX = 4
BYTES_MAX = 20_000
STRATEGY = build_strategy("default")


@given(st.lists(st.integers(0, 25_000), max_size=30))
def test_the_latest_are_kept(sizes: list[int]) -> None:
    log = DecisionLog(decisions_max=DECISIONS_MAX, bytes_max=BYTES_MAX)
    kept: deque[tuple[str, int]] = deque()
    for number, size in enumerate(sizes):
        record = RequestRecord(f"{number}", "t", "p", "POST", "/r", 0.0)
        context = replace(request(), body=b" " * size)
        decision = log.open(record, Step(context, STRATEGY, (), (), (), None, None, "why", 0.0))
        kept.append((record.request_id, decision.size_bytes))
        while len(kept) > DECISIONS_MAX or sum(each for _, each in kept) > BYTES_MAX:
            kept.popleft()
        assert len(log) == len(kept)
        assert log.size_bytes == sum(each for _, each in kept)
    names = {name for name, _ in kept}
    assert {f"{number}" for number in range(len(sizes)) if log.find(f"{number}")} == names
