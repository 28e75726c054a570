"""Silence is judged only as far as this process has witnessed it."""

import pytest

from controlplane.fleet.liveness import Witness, judge
from core.states import NodeState

SILENT, LOST = 6.0, 40.0


@pytest.mark.parametrize(
    ("why", "state", "heard_at", "seen_at", "trusted_since", "now", "expected"),
    [
        ("heard just now", NodeState.READY, 99.0, 50.0, 0.0, 100.0, NodeState.READY),
        ("missed three heartbeats", NodeState.READY, 93.0, 50.0, 0.0, 100.0, NodeState.SILENT),
        ("silent and heard again", NodeState.SILENT, 99.0, 50.0, 0.0, 100.0, NodeState.READY),
        ("silent too long", NodeState.SILENT, 59.0, 50.0, 0.0, 100.0, NodeState.LOST),
        ("lost stays lost", NodeState.LOST, None, 99.0, 0.0, 100.0, NodeState.LOST),
        ("lost and heard again", NodeState.LOST, 99.0, 0.0, 0.0, 100.0, NodeState.READY),
        ("no session here, record fresh", NodeState.READY, None, 95.0, 0.0, 100.0, NodeState.READY),
        ("no session here, short silence", NodeState.READY, None, 80.0, 0.0, 100.0, NodeState.READY),
        ("no session here, record old", NodeState.READY, None, 50.0, 0.0, 100.0, NodeState.LOST),
        ("just restarted", NodeState.READY, None, 0.0, 90.0, 100.0, NodeState.READY),
        ("store was away", NodeState.SILENT, 10.0, 10.0, 95.0, 100.0, NodeState.SILENT),
    ],
)
def test_judgement(
    why: str,
    state: NodeState,
    heard_at: float | None,
    seen_at: float,
    trusted_since: float,
    now: float,
    expected: NodeState,
) -> None:
    assert (
        judge(
            state=state,
            heard_at=heard_at,
            witness=Witness(1, seen_at),
            trusted_since=trusted_since,
            now=now,
            silent_after_seconds=SILENT,
            lost_after_seconds=LOST,
        )
        is expected
    ), why
