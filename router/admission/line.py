"""The waiting line of one deployment: who goes first, who has to leave when it is full.

In come waiters, out comes the one that is next. Order:

    1. tier: fast before base;
    2. priority of the request: lower first, as vLLM orders, within bounds;
    3. among the keys of one class, start-time fair queueing by token cost
       (P. Goyal, H. Vin, H. Cheng, "Start-time fair queueing", SIGCOMM 1996): S = max(v, F of the key),
       F = S + cost, the smallest S is next, v = S of the last one that went.

Every `OLDEST_EVERY`-th place goes to whoever has waited longest, whatever its class: with n waiters before it
in the order of arrival, a waiter is next within OLDEST_EVERY * (n + 1) places, so that nobody starves. A pure
data structure: no clock, no I/O; it wakes nobody. Bounded by the number of waiters.
"""

import heapq
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Generic, TypeVar

# A quarter is enough to move the ordinary tier under a flood of the fast one, and leaves three to the order.
OLDEST_EVERY = 4
# Priorities of requests are cut to this: more steps tell nothing, and each may be a class of its own.
PRIORITY_MAX = 100
# Dead entries that a class may hold before it is swept, beside as many as it has living ones.
_SLACK = 16


@dataclass(slots=True, eq=False)
class Ticket:
    """What decides on a waiter's place.

    Attributes:
        rank: Of the tier; 0 is served before 1.
        priority: Of the request; lower first.
        key: Whose request it is: keys share a class fairly.
        cost_tokens: What serving it is expected to take, at least 1.
        number: Order of arrival; given by the line.
        start_tag: Start tag of fair queueing; given by the line.
    """

    rank: int
    priority: int
    key: str
    cost_tokens: int
    number: int = 0
    start_tag: float = 0.0

    def __post_init__(self) -> None:
        self.priority = max(-PRIORITY_MAX, min(PRIORITY_MAX, self.priority))
        self.cost_tokens = max(1, self.cost_tokens)


class LineFull(Exception):
    """There is no place, and nobody in the line has less right to one."""


Waiting = TypeVar("Waiting", bound=Ticket)


@dataclass(slots=True)
class _Class(Generic[Waiting]):
    """Waiters of one tier and priority.

    Attributes:
        virtual: Start tag of the last one that went.
        finish: Finish tag of the last ticket of each key.
        keys: Waiting tickets of each key, by number.
        heap: Start tag, number and ticket; tickets that have left stay until they come up or are swept.
    """

    virtual: float = 0.0
    finish: dict[str, float] = field(default_factory=dict)
    keys: dict[str, dict[int, Waiting]] = field(default_factory=dict)
    heap: list[tuple[float, int, Waiting]] = field(default_factory=list)
    size: int = 0

    def add(self, ticket: Waiting) -> None:
        self.keys.setdefault(ticket.key, {})[ticket.number] = ticket
        self.size += 1
        heapq.heappush(self.heap, (ticket.start_tag, ticket.number, ticket))

    def holds(self, ticket: Waiting) -> bool:
        return ticket.number in self.keys.get(ticket.key, ())

    def take(self, ticket: Waiting, *, served: bool) -> None:
        waiting = self.keys[ticket.key]
        del waiting[ticket.number]
        if not waiting:
            del self.keys[ticket.key]
            if not served:
                # Nobody pays for what was not served.
                self.finish[ticket.key] = ticket.start_tag
        self.size -= 1
        if len(self.heap) > 2 * self.size + _SLACK:
            self.heap = [entry for entry in self.heap if self.holds(entry[2])]
            heapq.heapify(self.heap)
        if len(self.finish) > 2 * len(self.keys) + _SLACK:
            # A key that is not here and whose share is used up begins as a new one would.
            self.finish = {
                key: tag for key, tag in self.finish.items() if key in self.keys or tag > self.virtual
            }

    def first(self) -> Waiting:
        while not self.holds(self.heap[0][2]):
            heapq.heappop(self.heap)
        return self.heap[0][2]

    def newest_of_longest(self) -> tuple[int, Waiting]:
        """Returns how many the key with the most tickets has, and its newest one."""
        waiting = max(self.keys.values(), key=len)
        return len(waiting), waiting[max(waiting)]


class WaitingLine(Generic[Waiting]):
    """Bounded and ordered; see the module.

    Attributes:
        size_max: Most waiters; may be changed, which makes nobody leave.
    """

    def __init__(self, size_max: int) -> None:
        self.size_max = size_max
        self._classes: dict[tuple[int, int], _Class[Waiting]] = {}
        self._arrivals: OrderedDict[int, Waiting] = OrderedDict()
        self._numbers = 0
        self._places = 0

    def __len__(self) -> int:
        return len(self._arrivals)

    def __iter__(self) -> Iterator[Waiting]:
        """Yields the waiters in the order of their arrival."""
        return iter(self._arrivals.values())

    def __contains__(self, ticket: Waiting) -> bool:
        return ticket.number in self._arrivals

    def push(self, ticket: Waiting) -> Waiting | None:
        """Lets a waiter join.

        A full line makes room for one with more right to a place: the newest waiter of the lowest class goes
        for a better class, and within a class the newest of the key with the most for a key with fewer.

        Returns:
            Who had to leave; None where there was room.

        Raises:
            LineFull: No room, and nobody to make any.
        """
        victim = None
        if len(self._arrivals) >= self.size_max:
            victim = self._victim(ticket)
            self.remove(victim)
        self._numbers += 1
        ticket.number = self._numbers
        group = self._classes.setdefault((ticket.rank, ticket.priority), _Class())
        ticket.start_tag = max(group.virtual, group.finish.get(ticket.key, 0.0))
        group.finish[ticket.key] = ticket.start_tag + ticket.cost_tokens
        group.add(ticket)
        self._arrivals[ticket.number] = ticket
        return victim

    def restore(self, ticket: Waiting) -> None:
        """Puts back a waiter that was next and could not go: it stands where it stood."""
        group = self._classes.get((ticket.rank, ticket.priority))
        if group is None:
            group = self._classes[ticket.rank, ticket.priority] = _Class(virtual=ticket.start_tag)
        group.add(ticket)
        older = [number for number in self._arrivals if number < ticket.number]
        self._arrivals[ticket.number] = ticket
        for number in (ticket.number, *reversed(older)):
            self._arrivals.move_to_end(number, last=False)

    def pop(self) -> Waiting | None:
        """Takes out who is next; None for an empty line."""
        if not self._arrivals:
            return None
        self._places += 1
        if self._places % OLDEST_EVERY == 0:
            ticket = next(iter(self._arrivals.values()))
        else:
            ticket = self._classes[min(self._classes)].first()
        group = self._classes[ticket.rank, ticket.priority]
        group.virtual = max(group.virtual, ticket.start_tag)
        self._take(ticket, served=True)
        return ticket

    def remove(self, ticket: Waiting) -> None:
        """Lets a waiter leave; its place is free at once. For one that is not in the line it does nothing."""
        if ticket.number in self._arrivals:
            self._take(ticket, served=False)

    def _take(self, ticket: Waiting, *, served: bool) -> None:
        del self._arrivals[ticket.number]
        place = (ticket.rank, ticket.priority)
        group = self._classes[place]
        group.take(ticket, served=served)
        if not group.size:
            del self._classes[place]

    def _victim(self, ticket: Waiting) -> Waiting:
        if not self._classes:
            raise LineFull
        lowest = max(self._classes)
        group = self._classes[lowest]
        most, newest = group.newest_of_longest()
        if lowest > (ticket.rank, ticket.priority):
            return newest
        if lowest == (ticket.rank, ticket.priority) and most > len(group.keys.get(ticket.key, ())) + 1:
            return newest
        raise LineFull
