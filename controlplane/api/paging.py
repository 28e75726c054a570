"""Page tokens: where a listing stands, and the revision that all its pages are read at.

In comes a token of an earlier answer, out comes the last key and the revision; and back. Callers must
not read anything into it.
"""

import base64
import binascii
import json
from dataclasses import dataclass

from core.errors import InvalidArgument

_TOKEN_LENGTH_MAX = 1024


@dataclass(frozen=True, slots=True)
class Position:
    """Where the next page begins.

    Attributes:
        prefix: What is listed; a token of another listing is refused.
        start_after: Last key of the page before; empty for the first page.
        revision: Revision of the listing; 0 for the first page.
    """

    prefix: str
    start_after: str = ""
    revision: int = 0

    def token(self) -> str:
        """Returns the token of this position."""
        content = json.dumps([self.prefix, self.start_after.removeprefix(self.prefix), self.revision])
        return base64.urlsafe_b64encode(content.encode()).decode().rstrip("=")


def position_of(token: str, prefix: str) -> Position:
    """Reads a token.

    Raises:
        InvalidArgument: It is none of ours.
    """
    if not token:
        return Position(prefix)
    try:
        if len(token) > _TOKEN_LENGTH_MAX:
            raise ValueError
        content = json.loads(base64.urlsafe_b64decode(token + "=" * (-len(token) % 4)))
        listed, name, revision = content
        if listed != prefix or not isinstance(name, str) or not name or isinstance(revision, bool):
            raise TypeError
        if not isinstance(revision, int) or not 0 < revision < 1 << 62:
            raise TypeError
    except (ValueError, TypeError, binascii.Error, RecursionError) as error:
        raise InvalidArgument.of(
            "page_token", "is none that this service gave out for this listing; begin again without one"
        ) from error
    return Position(prefix, prefix + name, revision)
