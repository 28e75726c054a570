"""Prompt tokens that engines still have to compute for us: counted before the await, released once.

In come requests as they are sent and their first bytes, out come pending tokens by replica. Engines prefill
in the order of arrival, so a first byte also tells that everything sent there earlier has been computed:
that releases answers in one piece, whose own first byte comes only when all is generated.
"""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(slots=True, eq=False)
class Entry:
    """One request that waits for its first byte."""

    replica: str
    tokens: int


class PrefillLedger:
    """Pending prompt tokens by replica; a replica without any takes no room."""

    def __init__(self) -> None:
        self._entries: dict[str, dict[Entry, None]] = {}
        self._tokens: dict[str, int] = {}

    @property
    def counts(self) -> Mapping[str, int]:
        """Pending tokens by replica, as they are at any moment; a replica without any is not in it."""
        return self._tokens

    def pending_tokens(self, replica: str) -> int:
        """Returns the tokens that a replica has not computed yet."""
        return self._tokens.get(replica, 0)

    def add(self, entry: Entry) -> None:
        """Counts a request that is about to be sent."""
        replica, tokens = entry.replica, entry.tokens
        entries = self._entries.get(replica)
        if entries is None:
            self._entries[replica] = {entry: None}
            self._tokens[replica] = tokens
        else:
            entries[entry] = None
            self._tokens[replica] += tokens

    def computed(self, entry: Entry) -> None:
        """Releases a request whose first byte has come, and all that were sent to its replica before."""
        entries = self._entries.get(entry.replica)
        if entries is None or entry not in entries:
            return
        while True:
            earlier = next(iter(entries))
            self.drop(earlier)
            if earlier is entry:
                return

    def drop(self, entry: Entry) -> None:
        """Releases one request, whatever became of it; again does nothing."""
        entries = self._entries.get(entry.replica)
        if entries is None or entry not in entries:
            return
        del entries[entry]
        if entries:
            self._tokens[entry.replica] -= entry.tokens
        else:
            del self._entries[entry.replica]
            del self._tokens[entry.replica]
