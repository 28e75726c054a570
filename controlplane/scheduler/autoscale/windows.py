"""Times of the week: which floor holds at a moment, in zones whose clocks are set forward and back.

In come windows and the present, out comes the floor. A window's edges are moments, not clock readings: a
start that the clock skips is the moment at which it jumps, a start that the clock shows twice is the first
time, an end that it shows twice is the second. Pure: zones come in as values.
"""

import re
from collections.abc import Iterator
from datetime import UTC, date, datetime, time, timedelta, tzinfo

from controlplane.scheduler.autoscale.structs import AutoscalePolicy, Floor, Window

DAY_NAMES = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
_TIME = re.compile(r"([01][0-9]|2[0-3]):([0-5][0-9])")
_RESOLUTION = timedelta(seconds=1)


def parse_days(text: str) -> frozenset[int]:
    """Reads `mon`, `mon-fri`, `sat,sun` or `*`; 0 is Monday.

    Raises:
        ValueError: It is none of these; the message names the part.
    """
    if text.strip() == "*":
        return frozenset(range(7))
    days: set[int] = set()
    for part in text.lower().split(","):
        first, dash, last = part.strip().partition("-")
        ends = [first.strip(), last.strip()] if dash else [first.strip()]
        for each in ends:
            if each not in DAY_NAMES:
                raise ValueError(f"`{each[:20]}` is no day; use {', '.join(DAY_NAMES)}, `mon-fri`, or `*`")
        begin, end = DAY_NAMES.index(ends[0]), DAY_NAMES.index(ends[-1])
        days.update((begin + offset) % 7 for offset in range((end - begin) % 7 + 1))
    return frozenset(days)


def parse_time(text: str) -> time:
    """Reads `HH:MM`.

    Raises:
        ValueError: It is none.
    """
    found = _TIME.fullmatch(text)
    if found is None:
        raise ValueError(f"`{text[:20]}` is no time of day; write it as HH:MM, from 00:00 to 23:59")
    return time(int(found[1]), int(found[2]))


def floor_at(policy: AutoscalePolicy, now: datetime) -> Floor:
    """Returns the floor of a moment.

    Among windows that have started the one that started last wins, of those that started together the one
    with more replicas. A window that is only warming up can raise the floor and not lower it: the window
    before it is still on.
    """
    started: list[tuple[datetime, int, str]] = []
    warming: list[tuple[int, str]] = []
    for window in policy.windows:
        for start, end in _occurrences(window, now):
            if start <= now < end:
                started.append((start, window.replicas, window.name))
            elif start - window.warm_up <= now < start:
                warming.append((window.replicas, f"{window.name} (warming up)"))
    floor = Floor(policy.min_replicas)
    if started:
        _, replicas, name = max(started)
        floor = Floor(replicas, name)
    if warming and max(warming)[0] > floor.replicas:
        floor = Floor(*max(warming))
    return Floor(min(floor.replicas, policy.max_replicas), floor.window)


def _occurrences(window: Window, now: datetime) -> Iterator[tuple[datetime, datetime]]:
    """Starts and ends around a moment: those that may have begun, and those that may be warming up."""
    first = (now - timedelta(days=2)).astimezone(window.zone).date()
    last = (now + window.warm_up).astimezone(window.zone).date()
    overnight = window.end <= window.start
    for offset in range((last - first).days + 1):
        day = first + timedelta(days=offset)
        if day.weekday() in window.days:
            end_day = day + timedelta(days=1) if overnight else day
            yield (
                moment_of(day, window.start, window.zone, last=False),
                moment_of(end_day, window.end, window.zone, last=True),
            )


def moment_of(day: date, clock: time, zone: tzinfo, *, last: bool) -> datetime:
    """Returns the moment at which a zone's clock shows a time on a day, in UTC.

    Args:
        day: Local day.
        clock: Local time.
        zone: Whose clock.
        last: Of two such moments, when the clock is set back, the second one.

    Returns:
        Where the clock never shows it, the moment at which it jumps over it.
    """
    local = datetime.combine(day, clock)
    early, late = (local.replace(tzinfo=zone, fold=fold).astimezone(UTC) for fold in (0, 1))
    if early <= late:
        return late if last else early
    # In a gap the two readings swap: fold 0 counts with the offset before it and comes out after the jump.
    before, after = late, early
    offset = before.astimezone(zone).utcoffset()
    while after - before > _RESOLUTION:
        middle = before + (after - before) / 2
        if middle.astimezone(zone).utcoffset() == offset:
            before = middle
        else:
            after = middle
    return after.replace(microsecond=0)
