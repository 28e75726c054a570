"""Identifiers that sort by time: ULIDs, made here because the format is forty lines.

In comes the time of the thing that is named, out comes 26 characters of Crockford's base 32: 48 bits of
milliseconds, 80 random bits. One maker never gives out a smaller identifier than before, even when the
clock steps back. Nothing here reads a clock.
"""

import secrets
from datetime import datetime

_ALPHABET = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
_RANDOM_BITS = 80
_RANDOM_LIMIT = 1 << _RANDOM_BITS
_LENGTH = 26
ULID_LAST = "7" + "Z" * (_LENGTH - 1)
"""Sorts after every ULID."""


class UlidMaker:
    """Makes ULIDs in growing order."""

    def __init__(self) -> None:
        self._last_ms = -1
        self._last_random = 0

    def make(self, moment: datetime) -> str:
        """Returns an identifier for something that happened at `moment` (aware)."""
        moment_ms = int(moment.timestamp() * 1000)
        if moment_ms > self._last_ms:
            self._last_ms = moment_ms
            # The top bit stays free, so that counting up within the millisecond cannot overflow in practice.
            self._last_random = secrets.randbits(_RANDOM_BITS - 1)
        else:
            self._last_random += 1
            if self._last_random >= _RANDOM_LIMIT:
                self._last_ms += 1
                self._last_random = 0
        return _encode((self._last_ms << _RANDOM_BITS) | self._last_random)


def _encode(number: int) -> str:
    characters: list[str] = []
    for _ in range(_LENGTH):
        characters.append(_ALPHABET[number & 31])
        number >>= 5
    return "".join(reversed(characters))
