"""Until when a replica may drain, by clocks that do not agree."""

from datetime import timedelta
from pathlib import Path

import pytest

from core.clock import to_timestamp
from nodeagent.replica import DRAIN_SECONDS_MAX, Replica, new_replica
from tests.support.clock import ManualClock
from tests.support.fleet import simulator_assignment

HOUR = timedelta(hours=1)


def _replica(clock: ManualClock) -> Replica:
    return new_replica(simulator_assignment("chat-a"), node="node-1", log_path=Path("/nowhere"), clock=clock)


@pytest.mark.parametrize("ahead", [-HOUR, timedelta(0), HOUR])
async def test_what_counts_is_how_much_was_left_when_the_order_was_sent(ahead: timedelta) -> None:
    clock = ManualClock()
    await clock.advance(100)
    replica = _replica(clock)
    sent_at = clock.now() + ahead
    replica.assignment.drain_deadline_time.CopyFrom(to_timestamp(sent_at + timedelta(seconds=30)))
    replica.note_drain_deadline(clock, sent_at)
    assert replica.drain_end_at == pytest.approx(130)


async def test_without_a_time_of_sending_the_clocks_are_taken_to_agree() -> None:
    clock = ManualClock()
    await clock.advance(100)
    replica = _replica(clock)
    replica.note_drain_deadline(clock, None)
    assert replica.drain_end_at is None
    replica.assignment.drain_deadline_time.CopyFrom(to_timestamp(clock.now() - HOUR))
    replica.note_drain_deadline(clock, None)
    assert replica.drain_end_at == pytest.approx(100)
    replica.assignment.drain_deadline_time.CopyFrom(to_timestamp(clock.now() + 24 * HOUR))
    replica.note_drain_deadline(clock, None)
    assert replica.drain_end_at == pytest.approx(100 + DRAIN_SECONDS_MAX)
