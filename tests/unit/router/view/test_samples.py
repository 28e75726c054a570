"""Samples age, and a stale one is unknown."""

from datetime import timedelta

from millrace.core.v1 import stats_pb2

from core.clock import to_timestamp
from router.view.samples import STALE_SECONDS, SampleTable
from tests.support.clock import ManualClock


def _stats(clock: ManualClock, *, age_seconds: float = 0.0, running: int | None = 3) -> stats_pb2.EngineStats:
    stats = stats_pb2.EngineStats(
        replica="r", incarnation="i", sample_time=to_timestamp(clock.now() - timedelta(seconds=age_seconds))
    )
    if running is not None:
        stats.running_requests = running
    return stats


async def test_sample_is_fresh_then_stale() -> None:
    clock = ManualClock()
    table = SampleTable(clock)
    table.record(_stats(clock), own_in_flight=1)
    await clock.advance(STALE_SECONDS)
    sample = table.fresh("r", "i")
    assert sample is not None
    assert sample.others_in_flight == 2
    await clock.advance(0.1)
    assert table.fresh("r", "i") is None
    assert table.age_seconds("r") is not None


def test_sample_of_another_run_or_replica_is_unknown() -> None:
    clock = ManualClock()
    table = SampleTable(clock)
    table.record(_stats(clock), own_in_flight=0)
    assert table.fresh("r", "other") is None
    assert table.fresh("other", "i") is None


def test_age_counts_from_when_it_was_taken() -> None:
    clock = ManualClock()
    table = SampleTable(clock)
    table.record(_stats(clock, age_seconds=STALE_SECONDS + 1), own_in_flight=0)
    assert table.fresh("r", "i") is None
    # A node whose clock is ahead does not make younger samples than now.
    table.record(_stats(clock, age_seconds=-100), own_in_flight=0)
    assert table.age_seconds("r") == 0


def test_missing_figures_are_unknown_and_own_requests_are_not_counted_twice() -> None:
    clock = ManualClock()
    table = SampleTable(clock)
    table.record(_stats(clock, running=None), own_in_flight=0)
    sample = table.fresh("r", "i")
    assert sample is not None
    assert sample.others_in_flight is None
    table.record(_stats(clock, running=2), own_in_flight=5)
    sample = table.fresh("r", "i")
    assert sample is not None
    assert sample.others_in_flight == 0


def test_replicas_that_left_are_forgotten() -> None:
    clock = ManualClock()
    table = SampleTable(clock)
    table.record(_stats(clock), own_in_flight=0)
    table.retain(["other"])
    assert len(table) == 0


def test_utilization_and_adapters_are_read_where_they_are_told() -> None:
    clock = ManualClock()
    table = SampleTable(clock)
    table.record(_stats(clock), own_in_flight=0)
    sample = table.fresh("r", "i")
    assert sample is not None
    assert (sample.device_utilization_ratio, sample.adapters, sample.adapters_max) == (None, None, None)
    stats = _stats(clock)
    stats.device_utilization_ratio = 0.0
    stats.adapters.running.append("a")
    stats.adapters.waiting.append("b")
    stats.adapters.running_max = 4
    table.record(stats, own_in_flight=0)
    sample = table.fresh("r", "i")
    assert sample is not None
    assert sample.device_utilization_ratio == 0.0
    assert (sample.adapters, sample.adapters_waiting) == (frozenset({"a"}), frozenset({"b"}))
    assert sample.adapters_max == 4
