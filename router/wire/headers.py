"""The headers of a request as they came: for looking up by name, and for passing on.

In come pairs of bytes, out come text by name and the pairs themselves. One object serves all requests of a
connection whose heads are the same bytes, so that what is worked out of it is kept here (`forwarded`).
"""

from collections.abc import Sequence
from typing import overload


class RequestHeaders:
    """Headers of a client's request.

    Attributes:
        pairs: Names and values as they came, in order.
        forwarded: What `upstream.headers` has made of them for engines; None before the first time.
        key_hash: Hash of the key that they show, by whoever authenticates; None before the first time, empty
            where they show none.
    """

    __slots__ = ("_values", "forwarded", "key_hash", "pairs")

    def __init__(self, pairs: Sequence[tuple[bytes, bytes]]) -> None:
        self.pairs = pairs
        self.forwarded: bytes | None = None
        self.key_hash: str | None = None
        self._values: dict[str, str] = {}
        for name, value in pairs:
            self._values.setdefault(
                name.decode("utf-8", "surrogateescape").lower(),
                value.decode("utf-8", "surrogateescape"),
            )

    @overload
    def get(self, name: str) -> str | None: ...

    @overload
    def get(self, name: str, default: str) -> str: ...

    def get(self, name: str, default: str | None = None) -> str | None:
        """Returns the first value of a header, by its name in lower case."""
        return self._values.get(name, default)

    def __len__(self) -> int:
        """Different names."""
        return len(self._values)

    def __contains__(self, name: str) -> bool:
        return name in self._values
