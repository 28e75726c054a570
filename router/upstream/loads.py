"""How many requests this process has at each endpoint: counted before the await, released once.

`begin` and `end`, which `hold` puts around a block, are the one choke point (law 2). In comes a replica id,
or the `Load` that stands for it, out come its present count and the peak since someone asked last. `retain`
bounds the table: it forgets whoever has left and has no request any more.
"""

from collections.abc import Iterator
from contextlib import contextmanager


class Load:
    """The requests at one replica, for those who look at it with every request.

    Attributes:
        in_flight: Requests now. Only its table changes it.
        peak: The most since someone asked last.
    """

    __slots__ = ("in_flight", "peak")

    def __init__(self) -> None:
        self.in_flight = 0
        self.peak = 0


class LoadTable:
    """Counts requests in flight by replica.

    Attributes:
        total: In flight at all endpoints together.
        version: Grows when a `Load` is forgotten, so that whoever keeps some takes them anew.
    """

    def __init__(self) -> None:
        self.total = 0
        self.version = 0
        self._loads: dict[str, Load] = {}

    def of(self, replica: str) -> Load:
        """Returns what counts a replica's requests; it is the same one until `version` changes."""
        load = self._loads.get(replica)
        if load is None:
            load = self._loads[replica] = Load()
        return load

    def in_flight(self, replica: str) -> int:
        """Returns the requests at a replica now."""
        load = self._loads.get(replica)
        return 0 if load is None else load.in_flight

    def take_peak(self, replica: str) -> int:
        """Returns the most requests at once since the last call, and starts over from now."""
        load = self._loads.get(replica)
        if load is None:
            return 0
        peak, load.peak = load.peak, load.in_flight
        return max(peak, load.in_flight)

    def retain(self, replicas: set[str]) -> None:
        """Forgets the peaks of all other replicas; their requests in flight stay counted."""
        for replica in [each for each in self._loads if each not in replicas]:
            load = self._loads[replica]
            load.peak = 0
            # Whoever counts a request keeps its `Load`: another one would count beside it.
            if not load.in_flight:
                del self._loads[replica]
                self.version += 1

    @contextmanager
    def hold(self, replica: str) -> Iterator[None]:
        """Counts one request at a replica for as long as the block runs."""
        load = self.of(replica)
        self.begin_at(load)
        try:
            yield
        finally:
            self.end_at(load)

    def begin(self, replica: str) -> None:
        """Counts one request; the caller ends it exactly once, whatever happens."""
        self.begin_at(self.of(replica))

    def end(self, replica: str) -> None:
        """Releases one request."""
        self.end_at(self._loads[replica])

    def begin_at(self, load: Load) -> None:
        """Does what `begin` does, for whoever has the `Load`."""
        present = load.in_flight + 1
        load.in_flight = present
        load.peak = max(load.peak, present)
        self.total += 1

    def end_at(self, load: Load) -> None:
        """Does what `end` does, for whoever has the `Load`."""
        self.total -= 1
        load.in_flight -= 1
