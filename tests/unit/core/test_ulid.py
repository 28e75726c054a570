"""ULIDs: they sort by time, also when the clock steps back."""

from datetime import UTC, datetime, timedelta

from core.ulid import ULID_LAST, UlidMaker

NOW = datetime(2030, 1, 1, tzinfo=UTC)


def test_they_grow_with_time_and_within_a_millisecond() -> None:
    maker = UlidMaker()
    made = [maker.make(NOW) for _ in range(1000)]
    made += [maker.make(NOW - timedelta(seconds=5)), maker.make(NOW + timedelta(milliseconds=1))]
    assert made == sorted(set(made))
    assert {len(each) for each in made} == {26}
    assert made[-1] < ULID_LAST


def test_the_time_stands_in_front() -> None:
    first, second = UlidMaker().make(NOW), UlidMaker().make(NOW)
    assert first != second
    assert first[:10] == second[:10]
