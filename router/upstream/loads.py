"""How many requests this process has at each endpoint: counted before the await, released once.

`begin` and `end`, which `hold` puts around a block, are the one choke point (law 2). In comes a replica id,
out come its present count and the peak since someone asked last. A replica without requests takes no room.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager


class LoadTable:
    """Counts requests in flight by replica.

    Attributes:
        total: In flight at all endpoints together.
    """

    def __init__(self) -> None:
        self.total = 0
        self._now: dict[str, int] = {}
        self._peak: dict[str, int] = {}

    @property
    def counts(self) -> Mapping[str, int]:
        """Requests by replica, as they are at any moment; a replica without any is not in it."""
        return self._now

    def in_flight(self, replica: str) -> int:
        """Returns the requests at a replica now."""
        return self._now.get(replica, 0)

    def take_peak(self, replica: str) -> int:
        """Returns the most requests at once since the last call, and starts over from now."""
        peak = self._peak.pop(replica, 0)
        present = self._now.get(replica, 0)
        if present:
            self._peak[replica] = present
        return max(peak, present)

    def retain(self, replicas: set[str]) -> None:
        """Forgets the peaks of all other replicas; their requests in flight stay counted."""
        for replica in [each for each in self._peak if each not in replicas]:
            del self._peak[replica]

    @contextmanager
    def hold(self, replica: str) -> Iterator[None]:
        """Counts one request at a replica for as long as the block runs."""
        self.begin(replica)
        try:
            yield
        finally:
            self.end(replica)

    def begin(self, replica: str) -> None:
        """Counts one request; the caller ends it exactly once, whatever happens."""
        present = self._now.get(replica, 0) + 1
        self._now[replica] = present
        if present > self._peak.get(replica, 0):
            self._peak[replica] = present
        self.total += 1

    def end(self, replica: str) -> None:
        """Releases one request."""
        self.total -= 1
        left = self._now[replica] - 1
        if left:
            self._now[replica] = left
        else:
            del self._now[replica]
