from datetime import UTC, datetime, timedelta

import pytest

from controlplane.scheduler.autoscale import AutoscalePolicy
from controlplane.scheduler.autoscale.replay import Load, ServiceModel, replay

BEGIN = datetime(2030, 1, 7, tzinfo=UTC)
MODEL = ServiceModel(requests_per_second=2.0, start=timedelta(seconds=60))


def loads(*rates: tuple[int, float]) -> list[Load]:
    """Pairs of a minute and the requests a second from then on."""
    return [Load(BEGIN + timedelta(minutes=minute), rate) for minute, rate in rates]


def test_a_constant_load_that_fits_changes_nothing() -> None:
    moments, summary = replay(AutoscalePolicy(1, 4), loads((0, 1.0), (60, 0.0)), MODEL)
    assert {each.desired for each in moments} == {1}
    assert (summary.steps, summary.requests, summary.late, summary.unserved) == (0, 3600, 0, 0)
    assert summary.replica_hours == pytest.approx(1.0)


def test_a_load_that_does_not_fit_adds_replicas_and_every_request_is_served() -> None:
    series = loads((0, 0.5), (10, 5.0), (40, 0.1), (120, 0.0))
    moments, summary = replay(AutoscalePolicy(1, 6), series, MODEL)
    assert 3 <= summary.most <= 6
    assert moments[-1].desired == 1
    assert summary.unserved == 0
    assert 0 < summary.late < summary.requests * 0.1
    assert summary.longest_wait < timedelta(minutes=3)
    assert summary.replica_hours < summary.fixed_hours
    first = next(each for each in moments if each.step)
    assert first.reason == "ScaledOut"
    assert BEGIN + timedelta(minutes=10) < first.time < BEGIN + timedelta(minutes=11)
    # What was ordered serves after the start time, not before.
    serving = next(each for each in moments if each.serving > 1)
    assert MODEL.start <= serving.time - first.time <= MODEL.start + timedelta(seconds=10)


def test_without_enough_replicas_requests_wait_and_are_counted() -> None:
    _, summary = replay(AutoscalePolicy(1, 1), loads((0, 4.0), (10, 0.0)), MODEL)
    assert summary.requests == 2400
    assert summary.unserved == pytest.approx(1200, abs=15)
    assert summary.late > 2000
    assert summary.longest_wait > timedelta(minutes=4)


def test_it_sleeps_and_the_request_that_wakes_it_waits_for_the_start() -> None:
    series = loads((0, 0.0), (30, 0.1), (35, 0.0), (60, 0.0))
    moments, summary = replay(AutoscalePolicy(0, 2), series, MODEL)
    assert [each.reason for each in moments if each.step] == ["ScaledToZero", "WokenUp", "ScaledToZero"]
    assert MODEL.start <= summary.longest_wait <= MODEL.start + timedelta(seconds=10)
    assert summary.replica_hours < 0.5


def test_equal_arguments_give_equal_replays() -> None:
    series = loads((0, 0.5), (10, 5.0), (40, 0.1), (50, 0.0))
    assert replay(AutoscalePolicy(1, 6), series, MODEL) == replay(AutoscalePolicy(1, 6), series, MODEL)


def test_a_series_without_time_is_refused() -> None:
    with pytest.raises(ValueError, match="at least two moments"):
        replay(AutoscalePolicy(1, 6), loads((0, 1.0)), MODEL)
