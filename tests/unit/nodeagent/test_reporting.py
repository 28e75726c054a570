"""Pending reports: latest per replica, kept until accepted, bounded."""

import asyncio

from millrace.core.v1 import replica_pb2, types_pb2
from millrace.fleet.v1 import fleet_service_pb2

from nodeagent.reporting import EVENTS_MAX, Reporter


def observation(name: str, state: int) -> replica_pb2.ReplicaObservation:
    return replica_pb2.ReplicaObservation(replica=name, state=types_pb2.ReplicaState.ValueType(state))


async def test_only_the_latest_observation_is_pending() -> None:
    reporter = Reporter()
    reporter.put(observation("a", 64))
    reporter.put(observation("a", 128))
    reporter.put(observation("b", 64))
    batch = reporter.batch()
    assert {each.replica: each.state for each in batch.observations} == {"a": 128, "b": 64}
    reporter.accepted(batch)
    assert reporter.batch().observations == []


async def test_a_change_during_the_report_stays_pending() -> None:
    reporter = Reporter()
    reporter.put(observation("a", 64))
    batch = reporter.batch()
    reporter.put(observation("a", 128))
    reporter.accepted(batch)
    assert [each.state for each in reporter.batch().observations] == [128]
    await asyncio.wait_for(reporter.wait(), 1)


async def test_reports_are_copies() -> None:
    reporter = Reporter()
    changing = observation("a", 64)
    reporter.put(changing)
    changing.state = types_pb2.REPLICA_STATE_READY
    assert reporter.batch().observations[0].state == 64


async def test_events_are_bounded_and_told_once() -> None:
    reporter = Reporter()
    for number in range(EVENTS_MAX + 5):
        reporter.put_event(fleet_service_pb2.AgentEvent(message=str(number)))
    batch = reporter.batch()
    assert len(batch.events) == EVENTS_MAX
    assert batch.events[0].message == "5"
    reporter.accepted(batch, with_events=False)
    assert len(reporter.batch().events) == EVENTS_MAX
    reporter.put_event(fleet_service_pb2.AgentEvent(message="late"))
    reporter.accepted(batch)
    assert [event.message for event in reporter.batch().events] == ["late"]
    reporter.accepted(reporter.batch())
    await asyncio.wait_for(reporter.drained(), 1)
