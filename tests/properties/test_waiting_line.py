"""The waiting line, whatever happens: nobody is lost or served twice, the bound holds, nobody starves."""

from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from router.admission.line import OLDEST_EVERY, LineFull, Ticket, WaitingLine

SIZE_MAX = 6


class Line(RuleBasedStateMachine):
    """Drives a line beside a plain list of who must be in it, in the order of arrival."""

    def __init__(self) -> None:
        super().__init__()
        self.line: WaitingLine[Ticket] = WaitingLine(SIZE_MAX)
        self.waiting: list[Ticket] = []
        self.popped: list[Ticket] = []

    @rule(
        rank=st.integers(0, 1),
        priority=st.integers(-2, 2),
        key=st.sampled_from("abc"),
        cost=st.integers(-1, 1000),
    )
    def push(self, rank: int, priority: int, key: str, cost: int) -> None:
        ticket = Ticket(rank, priority, key, cost)
        full = len(self.waiting) >= SIZE_MAX
        try:
            victim = self.line.push(ticket)
        except LineFull:
            assert full
            # Whoever is turned away has no more right to a place than any of those who wait.
            assert all((each.rank, each.priority) <= (rank, ticket.priority) for each in self.waiting)
            return
        assert (victim is not None) == full
        if victim is not None:
            assert (victim.rank, victim.priority) >= (rank, ticket.priority)
            self.waiting.remove(victim)
        self.waiting.append(ticket)

    @rule()
    def pop(self) -> None:
        best = min(((each.rank, each.priority) for each in self.waiting), default=None)
        ticket = self.line.pop()
        if ticket is None:
            assert not self.waiting
            return
        assert (ticket.rank, ticket.priority) == best or ticket is self.waiting[0]
        self.waiting.remove(ticket)
        self.popped.append(ticket)

    @precondition(lambda self: self.popped)
    @rule(data=st.data())
    def restore(self, data: st.DataObject) -> None:
        ticket = data.draw(st.sampled_from(self.popped))
        self.popped.remove(ticket)
        self.line.restore(ticket)
        self.waiting.append(ticket)
        self.waiting.sort(key=lambda each: each.number)

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        ticket = data.draw(st.sampled_from(self.waiting))
        self.line.remove(ticket)
        self.waiting.remove(ticket)

    @invariant()
    def holds_exactly_who_waits(self) -> None:
        assert len(self.line) == len(self.waiting)
        assert all(each in self.line for each in self.waiting)
        assert not any(each in self.line for each in self.popped)


TestLine = Line.TestCase

_TICKETS = st.tuples(st.integers(0, 1), st.integers(-3, 3), st.sampled_from("abcd"), st.integers(1, 100_000))


@given(st.lists(_TICKETS, max_size=12), _TICKETS, st.lists(_TICKETS, max_size=120))
def test_nobody_starves(
    before: list[tuple[int, int, str, int]],
    one: tuple[int, int, str, int],
    after: list[tuple[int, int, str, int]],
) -> None:
    line: WaitingLine[Ticket] = WaitingLine(1000)
    for each in before:
        line.push(Ticket(*each))
    ticket = Ticket(*one)
    line.push(ticket)
    places, later = 0, iter(after * 2)
    while ticket in line:
        # A flood: two come for each that goes.
        for _ in range(2):
            if (flood := next(later, None)) is not None:
                line.push(Ticket(*flood))
        line.pop()
        places += 1
    assert places <= OLDEST_EVERY * (len(before) + 1)


@given(st.lists(st.tuples(st.sampled_from("ab"), st.integers(1, 1000)), min_size=2, max_size=60))
def test_keys_of_one_class_get_equal_shares(arrivals: list[tuple[str, int]]) -> None:
    """While both wait, served costs differ by no more than the bound of start-time fair queueing."""
    line: WaitingLine[Ticket] = WaitingLine(1000)
    for key, cost in arrivals:
        line.push(Ticket(0, 0, key, cost))
    served = {"a": 0, "b": 0}
    waiting = {key: sum(1 for each, _ in arrivals if each == key) for key in "ab"}
    group = line._classes[0, 0]
    while all(waiting.values()):
        ticket = group.first()
        group.virtual = ticket.start_tag
        line._take(ticket, served=True)
        served[ticket.key] += ticket.cost_tokens
        waiting[ticket.key] -= 1
        largest = {key: max(cost for each, cost in arrivals if each == key) for key in "ab"}
        assert abs(served["a"] - served["b"]) <= largest["a"] + largest["b"]
