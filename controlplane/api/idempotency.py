"""Retries made safe: the same request_id of the same call answers with the same answer.

Keeps answers of this process for some minutes, bounded. It is a courtesy for clients that lost an
answer: writes that must survive a restart (declarations) keep their request_id in the store instead.
"""

from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar, cast

from google.protobuf.message import Message

from controlplane.api import limits
from core.clock import Clock
from core.errors import InvalidArgument

Answer = TypeVar("Answer", bound=Message)


@dataclass(frozen=True, slots=True)
class _Remembered:
    request: bytes
    answer: Message
    kept_until: float


class RequestMemory:
    """Remembers answers by request_id."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._answers: OrderedDict[str, _Remembered] = OrderedDict()

    async def once(self, request_id: str, request: Message, call: Callable[[], Awaitable[Answer]]) -> Answer:
        """Calls, or answers as before.

        Args:
            request_id: The caller's; empty always calls.
            request: The whole request.
            call: Makes the change.

        Raises:
            InvalidArgument: The id was used for another request.
        """
        if not request_id:
            return await call()
        # The type is part of it: one id for two different calls is a mistake too.
        sent = request.DESCRIPTOR.full_name.encode() + b"\0" + request.SerializeToString(deterministic=True)
        now = self._clock.monotonic()
        known = self._answers.get(request_id)
        if known is not None and known.kept_until > now:
            if known.request != sent:
                raise InvalidArgument.of(
                    "request_id", "was used for another request; make a new UUID4 for each request"
                )
            return cast("Answer", known.answer)
        answer = await call()
        self._answers[request_id] = _Remembered(sent, answer, now + limits.REMEMBERED_SECONDS)
        self._answers.move_to_end(request_id)
        while len(self._answers) > limits.REMEMBERED_REQUESTS_MAX:
            self._answers.popitem(last=False)
        return answer
