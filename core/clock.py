"""Time as a dependency: whatever waits or stamps takes a `Clock`, so that tests own time.

Out come aware UTC datetimes (`now`), a monotonic reading for durations, and sleeping. Pure code takes
the time itself as an argument and never sees a clock.
"""

import asyncio
import time
from datetime import UTC, datetime
from typing import Protocol

from google.protobuf.timestamp_pb2 import Timestamp


class Clock(Protocol):
    """Where time comes from."""

    def now(self) -> datetime:
        """Wall-clock time, aware, UTC: for stamps that people read."""
        ...

    def monotonic(self) -> float:
        """Seconds from an arbitrary start: for durations and deadlines."""
        ...

    async def sleep(self, seconds: float) -> None:
        """Waits."""
        ...


class SystemClock:
    """The machine's clock."""

    def now(self) -> datetime:
        """Wall-clock time, aware, UTC."""
        return datetime.now(UTC)

    # The function itself: the hot path asks ten times a request.
    monotonic = staticmethod(time.monotonic)

    async def sleep(self, seconds: float) -> None:
        """Waits."""
        await asyncio.sleep(seconds)


def to_timestamp(moment: datetime) -> Timestamp:
    """Converts an aware datetime to its protobuf form."""
    stamp = Timestamp()
    stamp.FromDatetime(moment.astimezone(UTC))
    return stamp


def from_timestamp(stamp: Timestamp) -> datetime | None:
    """Converts a protobuf timestamp to an aware datetime; None for one that was never set."""
    if stamp.seconds == 0 and stamp.nanos == 0:
        return None
    return stamp.ToDatetime(tzinfo=UTC)
