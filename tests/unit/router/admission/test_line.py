"""The order of the waiting line, its bound, and who makes room."""

import pytest

from router.admission.line import OLDEST_EVERY, LineFull, Ticket, WaitingLine

FAST, BASE = 0, 1


def _push(
    line: WaitingLine[Ticket], key: str = "k", *, rank: int = BASE, priority: int = 0, cost: int = 1
) -> Ticket:
    ticket = Ticket(rank, priority, key, cost)
    line.push(ticket)
    return ticket


def _order(line: WaitingLine[Ticket]) -> list[str]:
    found = []
    while (ticket := line.pop()) is not None:
        found.append(ticket.key)
    return found


def test_fast_before_base_and_the_oldest_every_fourth_time() -> None:
    line: WaitingLine[Ticket] = WaitingLine(100)
    for number in range(4):
        _push(line, f"base-{number}")
    for number in range(6):
        _push(line, f"fast-{number}", rank=FAST)
    assert OLDEST_EVERY == 4
    assert _order(line) == [
        "fast-0", "fast-1", "fast-2", "base-0", "fast-3", "fast-4", "fast-5", "base-1", "base-2", "base-3",
    ]  # fmt: skip


def test_lower_priority_first_within_a_tier_and_within_bounds() -> None:
    line: WaitingLine[Ticket] = WaitingLine(100)
    _push(line, "late", priority=5)
    _push(line, "early", priority=-5)
    _push(line, "fast", rank=FAST, priority=9)
    assert _order(line) == ["fast", "early", "late"]
    assert _push(line, priority=10**12).priority == 100
    assert _push(line, priority=-(10**12)).priority == -100


def test_keys_share_by_cost() -> None:
    line: WaitingLine[Ticket] = WaitingLine(100)
    for _ in range(12):
        _push(line, "flood")
    for _ in range(3):
        _push(line, "quiet")
    assert _order(line)[:6].count("quiet") >= 2
    for _ in range(6):
        _push(line, "large", cost=300)
    for _ in range(6):
        _push(line, "small", cost=100)
    # Three small requests cost as much as a large one; each fourth place is the oldest's.
    assert _order(line)[:8].count("small") >= 5


def test_a_full_line_makes_room_for_a_better_class_and_for_a_key_with_less() -> None:
    line: WaitingLine[Ticket] = WaitingLine(3)
    first, second, third = (_push(line, "flood") for _ in range(3))
    with pytest.raises(LineFull):
        _push(line, "flood")
    quiet = Ticket(BASE, 0, "quiet", 1)
    assert line.push(quiet) is third
    # One more each would only turn it round.
    with pytest.raises(LineFull):
        _push(line, "quiet")
    fast = Ticket(FAST, 0, "flood", 1)
    assert line.push(fast) is second
    assert len(line) == 3
    assert first in line
    assert second not in line
    assert _order(line) == ["flood", "flood", "quiet"]
    with pytest.raises(LineFull):
        _push(WaitingLine(0))


def test_a_waiter_that_leaves_frees_its_place_at_once() -> None:
    line: WaitingLine[Ticket] = WaitingLine(1)
    ticket = _push(line)
    line.remove(ticket)
    line.remove(ticket)
    assert len(line) == 0
    assert line.pop() is None
    _push(line, "other")
    assert _order(line) == ["other"]


def test_one_that_could_not_go_stands_where_it_stood() -> None:
    line: WaitingLine[Ticket] = WaitingLine(10)
    for number in range(4):
        _push(line, f"{number}")
    first, second = line.pop(), line.pop()
    assert first is not None
    assert second is not None
    line.restore(second)
    line.restore(first)
    assert _order(line) == ["0", "1", "2", "3"]
    alone = _push(line, "alone")
    assert line.pop() is alone
    line.restore(alone)
    _push(line, "later")
    assert _order(line) == ["alone", "later"]


def test_memory_does_not_grow_with_those_who_left() -> None:
    line: WaitingLine[Ticket] = WaitingLine(10)
    stay = _push(line, "stay")
    for number in range(1000):
        line.remove(_push(line, f"key-{number}"))
    group = line._classes[BASE, 0]
    assert len(group.heap) < 50
    assert len(group.finish) < 50
    line.pop()
    line.restore(stay)
    for number in range(1000):
        line.remove(_push(line, f"key-{number}"))
        line.restore(line.pop() or stay)
    assert len(line._classes[BASE, 0].heap) < 50
