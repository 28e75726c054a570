"""Prompt tokens that engines still have to compute for us: counted before the await, released once.

In come requests as they are sent and their first bytes, out come pending tokens by replica. Engines prefill
in the order of arrival, so a first byte also tells that everything sent there earlier has been computed:
that releases answers in one piece, whose own first byte comes only when all is generated. Requests of a
replica hang on each other in the order of their sending; `retain` forgets replicas that left.
"""


class Line:
    """What one replica still has to compute, for those who look at it with every request.

    Attributes:
        tokens: Of all requests in it. Only its ledger changes it.
        first: The earliest request; None for none.
        last: The latest.
    """

    __slots__ = ("first", "last", "tokens")

    def __init__(self) -> None:
        self.tokens = 0
        self.first: Entry | None = None
        self.last: Entry | None = None


class Entry:
    """One request that waits for its first byte."""

    __slots__ = ("earlier", "later", "line", "replica", "tokens")

    def __init__(self, replica: str, tokens: int) -> None:
        self.replica = replica
        self.tokens = tokens
        # Set as long as it is in the ledger.
        self.line: Line | None = None
        self.earlier: Entry | None = None
        self.later: Entry | None = None


class PrefillLedger:
    """Pending prompt tokens by replica."""

    def __init__(self) -> None:
        self._lines: dict[str, Line] = {}
        # At all replicas together.
        self._entries = 0
        self._tokens = 0

    def __len__(self) -> int:
        """Requests that wait for their first byte, wherever."""
        return self._entries

    @property
    def tokens(self) -> int:
        """Pending tokens of all replicas together."""
        return self._tokens

    def of(self, replica: str) -> Line:
        """Returns the line of a replica; it is the same one until `retain`."""
        line = self._lines.get(replica)
        if line is None:
            line = self._lines[replica] = Line()
        return line

    def pending_tokens(self, replica: str) -> int:
        """Returns the tokens that a replica has not computed yet."""
        line = self._lines.get(replica)
        return 0 if line is None else line.tokens

    def add(self, entry: Entry) -> None:
        """Counts a request that is about to be sent."""
        self.add_to(self.of(entry.replica), entry)

    def add_to(self, line: Line, entry: Entry) -> None:
        """Does what `add` does, for whoever has the line."""
        last = line.last
        if last is None:
            line.first = entry
        else:
            last.later = entry
            entry.earlier = last
        line.last = entry
        entry.line = line
        line.tokens += entry.tokens
        self._entries += 1
        self._tokens += entry.tokens

    def computed(self, entry: Entry) -> None:
        """Releases a request whose first byte has come, and all that were sent to its replica before."""
        line = entry.line
        while line is not None:
            earliest = line.first
            if earliest is None:
                return
            self.drop(earliest)
            if earliest is entry:
                return

    def drop(self, entry: Entry) -> None:
        """Releases one request, whatever became of it; again does nothing."""
        line = entry.line
        if line is None:
            return
        earlier, later = entry.earlier, entry.later
        if earlier is None:
            line.first = later
        else:
            earlier.later = later
        if later is None:
            line.last = earlier
        else:
            later.earlier = earlier
        line.tokens -= entry.tokens
        self._entries -= 1
        self._tokens -= entry.tokens
        # What has left keeps nothing alive that came before or after it.
        entry.line = entry.earlier = entry.later = None

    def retain(self, replicas: set[str]) -> None:
        """Forgets the lines of all other replicas, as far as nothing waits in them."""
        for replica in [each for each in self._lines if each not in replicas]:
            if self._lines[replica].first is None:
                del self._lines[replica]
