"""A request that waits, and what the line needs to know of it, read from its body once it has to wait.

In come the body and the request's account, out comes a `Waiter`. Requests that find room never get here. What
the body gets wrong is the engine's to refuse: here it only counts as not said.
"""

import asyncio
import math
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import orjson

from router.admission.line import Ticket
from router.record import RequestRecord
from router.view.view import Tier

# What answers take where the client sets no limit: the middle of published chat traces.
ANSWER_TOKENS = 256
# A limit is not an intention: clients set the largest number that there is.
ANSWER_TOKENS_MAX = 4096
# Characters of English text that make a token, as in `router.prefix.chain`.
_BYTES_PER_TOKEN = 4


class Word(Enum):
    """What a waiter is told."""

    GO = "go"
    LATE = "late"
    PUSHED_OUT = "pushed_out"
    GONE = "gone"


@dataclass(slots=True, eq=False)
class Waiter(Ticket):
    """A request in the line.

    Attributes:
        body_bytes: Memory that it holds.
        deadline_seconds: When it is refused, on the monotonic clock.
        word: Set once, with what it is told.
    """

    body_bytes: int = 0
    deadline_seconds: float = math.inf
    word: "asyncio.Future[Word]" = field(default_factory=lambda: asyncio.get_running_loop().create_future())


def waiter_of(body: bytes, record: RequestRecord, *, deadline_seconds: float) -> Waiter:
    """Makes a waiter; an event loop must be running.

    Cost = bytes of the body / 4 + the most tokens of the answer, as far as it is said, within bounds.

    Args:
        body: As it came; a JSON object may say priority and length.
        record: Tells tier and key.
        deadline_seconds: End of the wait, on the monotonic clock.
    """
    document = _document(body)
    answer = _integer(document, "max_completion_tokens") or _integer(document, "max_tokens") or ANSWER_TOKENS
    return Waiter(
        rank=0 if record.tier is Tier.FAST else 1,
        priority=_integer(document, "priority") or 0,
        key=record.key_hash,
        cost_tokens=len(body) // _BYTES_PER_TOKEN + min(max(1, answer), ANSWER_TOKENS_MAX),
        body_bytes=len(body),
        deadline_seconds=deadline_seconds,
    )


def _document(body: bytes) -> dict[str, Any]:
    """Reads a JSON object; anything else, such as a form, says nothing."""
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError:
        return {}
    return document if isinstance(document, dict) else {}


def _integer(document: dict[str, Any], name: str) -> int | None:
    value = document.get(name)
    return value if isinstance(value, int) and not isinstance(value, bool) else None
