"""Writes what one turn of the event loop has to say at its end, and not in between.

In come transports and bytes, out go the same bytes, in order, before the loop waits again. A write wakes
whoever reads it. Between two of them a busy router works for some ten microseconds, in which the reader has
done its part and sleeps again; behind one another they find it awake, which saves a third of their cost and
delays nobody by more than the turn. It holds nothing beyond that, and knows nothing of what it writes.
"""

import asyncio


class Outbox:
    """What is to be written at the end of a turn. One a worker."""

    __slots__ = ("_data", "_loop", "_transports")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        """Takes the loop of the worker."""
        self._loop = loop
        self._transports: list[asyncio.WriteTransport] = []
        self._data: list[bytes] = []

    def write(self, transport: asyncio.WriteTransport, data: bytes) -> None:
        """Writes to a transport by the end of this turn."""
        self._transports.append(transport)
        self._data.append(data)
        if len(self._data) == 1:
            self._loop.call_soon(self.flush)

    def flush(self) -> None:
        """Writes at once what there is."""
        transports, data = self._transports, self._data
        self._transports, self._data = [], []
        for at in range(len(transports)):
            transport = transports[at]
            if not transport.is_closing():
                transport.write(data[at])
