from datetime import UTC, date, datetime, time, timedelta
from zoneinfo import ZoneInfo

import pytest

from controlplane.scheduler.autoscale import AutoscalePolicy, Window, floor_at, parse_days, parse_time
from controlplane.scheduler.autoscale.windows import moment_of

BERLIN = ZoneInfo("Europe/Berlin")
# On 2030-03-31 the clocks go from 02:00 to 03:00, on 2030-10-27 from 03:00 back to 02:00.
SPRING, AUTUMN = date(2030, 3, 31), date(2030, 10, 27)


def window(
    days: str, hours: str, replicas: int, *, zone: ZoneInfo = BERLIN, warm_up: timedelta = timedelta(0)
) -> Window:
    start, _, end = hours.partition("-")
    return Window(
        f"{days} {hours}", parse_days(days), parse_time(start), parse_time(end), zone, replicas, warm_up
    )


def floor(moment: str, *windows: Window, least: int = 1, most: int = 9) -> int:
    now = datetime.fromisoformat(moment).replace(tzinfo=BERLIN).astimezone(UTC)
    return floor_at(AutoscalePolicy(least, most, windows=windows), now).replicas


@pytest.mark.parametrize(
    ("text", "days"),
    [
        ("*", {0, 1, 2, 3, 4, 5, 6}),
        ("mon", {0}),
        ("mon-fri", {0, 1, 2, 3, 4}),
        ("Sat, sun", {5, 6}),
        ("fri-mon", {4, 5, 6, 0}),
        ("mon,wed-thu", {0, 2, 3}),
    ],
)
def test_days_are_read(text: str, days: set[int]) -> None:
    assert parse_days(text) == days


@pytest.mark.parametrize("text", ["", "monday", "mon-", "1-5", "mon;tue", "mon,,tue"])
def test_what_is_no_day_is_named(text: str) -> None:
    with pytest.raises(ValueError, match="is no day"):
        parse_days(text)


@pytest.mark.parametrize("text", ["8:00", "24:00", "08:60", "0800", "", "08:00:00"])
def test_what_is_no_time_is_named(text: str) -> None:
    with pytest.raises(ValueError, match="HH:MM"):
        parse_time(text)


@pytest.mark.parametrize(
    ("moment", "expected"),
    [
        ("2030-01-07T07:59:59", 1),  # a Monday
        ("2030-01-07T08:00:00", 4),
        ("2030-01-07T17:59:59", 4),
        ("2030-01-07T18:00:00", 1),
        ("2030-01-12T12:00:00", 1),  # a Saturday
    ],
)
def test_working_hours(moment: str, expected: int) -> None:
    assert floor(moment, window("mon-fri", "08:00-18:00", 4)) == expected


def test_a_window_over_midnight_belongs_to_the_day_on_which_it_starts() -> None:
    night = window("fri", "22:00-06:00", 3)
    assert floor("2030-01-11T21:59:00", night) == 1
    assert floor("2030-01-11T22:00:00", night) == 3
    assert floor("2030-01-12T05:59:00", night) == 3
    assert floor("2030-01-12T06:00:00", night) == 1
    # Equal times are a whole day.
    assert floor("2030-01-12T21:59:00", window("fri", "22:00-22:00", 3)) == 3


def test_a_window_may_lower_the_floor_to_zero() -> None:
    assert floor("2030-01-12T12:00:00", window("sat,sun", "00:00-00:00", 0)) == 0


def test_the_latest_start_wins_and_ties_take_the_larger() -> None:
    day, lunch = window("*", "08:00-18:00", 4), window("*", "12:00-13:00", 2)
    assert floor("2030-01-07T11:00:00", day, lunch) == 4
    assert floor("2030-01-07T12:30:00", lunch, day) == 2
    assert floor("2030-01-07T13:30:00", lunch, day) == 4
    assert floor("2030-01-07T09:00:00", window("*", "08:00-18:00", 2), day) == 4


def test_warming_up_raises_the_floor_and_never_lowers_it() -> None:
    half_an_hour = timedelta(minutes=30)
    morning = window("mon-fri", "08:00-18:00", 4, warm_up=half_an_hour)
    assert floor("2030-01-07T07:29:00", morning) == 1
    assert floor("2030-01-07T07:30:00", morning) == 4
    evening = window("mon-fri", "17:00-20:00", 2, warm_up=half_an_hour)
    assert floor("2030-01-07T16:45:00", morning, evening) == 4
    assert floor("2030-01-07T17:00:00", morning, evening) == 2
    # A warm-up reaches into the evening before.
    assert floor("2030-01-06T23:45:00", window("mon", "00:00-06:00", 3, warm_up=half_an_hour)) == 3


def test_a_window_never_wants_more_than_the_policy_allows() -> None:
    assert floor("2030-01-07T09:00:00", window("*", "08:00-18:00", 9), most=5) == 5


def test_a_time_that_the_clock_skips_is_the_moment_of_the_jump() -> None:
    jump = datetime(2030, 3, 31, 1, tzinfo=UTC)
    for clock in (time(2, 0), time(2, 30), time(2, 59), time(3, 0)):
        assert moment_of(SPRING, clock, BERLIN, last=False) == jump
        assert moment_of(SPRING, clock, BERLIN, last=True) == jump
    assert moment_of(SPRING, time(1, 59), BERLIN, last=False) == jump - timedelta(minutes=1)
    assert moment_of(SPRING, time(3, 1), BERLIN, last=False) == jump + timedelta(minutes=1)


def test_a_time_that_the_clock_shows_twice_starts_early_and_ends_late() -> None:
    first = datetime(2030, 10, 27, 0, 30, tzinfo=UTC)
    assert moment_of(AUTUMN, time(2, 30), BERLIN, last=False) == first
    assert moment_of(AUTUMN, time(2, 30), BERLIN, last=True) == first + timedelta(hours=1)


def hours_at(policy: AutoscalePolicy, begin: datetime, replicas: int) -> float:
    """Hours of two days at which a floor holds, looked at every ten minutes."""
    moments = (begin + timedelta(minutes=10 * index) for index in range(48 * 6))
    return sum(1 for each in moments if floor_at(policy, each).replicas == replicas) / 6


@pytest.mark.parametrize(
    ("day", "hours", "expected"),
    [
        (SPRING, "01:00-05:00", 3),  # the hour that is missing is missing
        (SPRING, "02:30-05:00", 2),  # it starts at the jump, at 03:00
        (SPRING, "01:00-02:30", 1),  # it ends at the jump
        (SPRING, "02:10-02:50", 0),  # there is no such time
        (AUTUMN, "01:00-05:00", 5),
        (AUTUMN, "02:30-05:00", 3.5),
        (AUTUMN, "01:00-02:30", 2.5),
        (AUTUMN, "02:10-02:50", 1 + 40 / 60),
        (date(2030, 7, 7), "01:00-05:00", 4),
    ],
)
def test_how_long_a_window_lasts_when_clocks_are_set(day: date, hours: str, expected: float) -> None:
    (only,) = (window("sun", hours, 3),)
    policy = AutoscalePolicy(1, 9, windows=(only,))
    begin = datetime.combine(day, time(), BERLIN).astimezone(UTC) - timedelta(hours=12)
    assert hours_at(policy, begin, 3) == pytest.approx(expected)


def test_zones_half_an_hour_off_and_other_jumps() -> None:
    lord_howe = ZoneInfo("Australia/Lord_Howe")  # half an hour of summer time
    jump = moment_of(date(2030, 10, 6), time(2, 15), lord_howe, last=False)
    assert jump == datetime(2030, 10, 5, 15, 30, tzinfo=UTC)
    kathmandu = moment_of(date(2030, 1, 1), time(8, 0), ZoneInfo("Asia/Kathmandu"), last=False)
    assert kathmandu == datetime(2030, 1, 1, 2, 15, tzinfo=UTC)
