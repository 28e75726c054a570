"""Ports for engines, from a range.

Ports are handed out in turn rather than lowest first: a router may still hold the address of an engine
that has just ended, and must not reach another model under it.
"""

import random
import socket

from nodeagent.engines.base import CannotStart


class PortAllocator:
    """Hands out ports that nothing listens on."""

    def __init__(self, first: int, last: int, host: str, start: int | None = None) -> None:
        """Takes the range, both ends included, and the address that engines listen on."""
        self._first = first
        self._count = last - first + 1
        self._host = host
        self._taken: set[int] = set()
        # A restarted agent does not begin where the earlier one did.
        self._next = start if start is not None else random.randrange(self._count)  # noqa: S311 - no secret

    def allocate(self) -> int:
        """Returns a free port and keeps it until it is released.

        Raises:
            CannotStart: Every port of the range is taken.
        """
        for _ in range(self._count):
            port = self._first + self._next
            self._next = (self._next + 1) % self._count
            if port not in self._taken and self._free(port):
                self._taken.add(port)
                return port
        raise CannotStart(
            f"no free port from {self._first} to {self._first + self._count - 1}: widen "
            "--engine-port-first/--engine-port-last"
        )

    def reserve(self, port: int) -> None:
        """Marks the port of an adopted engine as taken."""
        self._taken.add(port)

    def release(self, port: int) -> None:
        """Gives a port back."""
        self._taken.discard(port)

    def _free(self, port: int) -> bool:
        family = socket.AF_INET6 if ":" in self._host else socket.AF_INET
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            # As engines do: connections of the past do not block the port, a listener does.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((self._host, port))
            except OSError:
                return False
        return True
