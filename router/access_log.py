"""One line in the log for each request, at a fraction of what the log of everything else costs a line.

In come closed accounts of requests, out go JSON lines with the fields that every line of the process has, in
batches: a batch is written when it is large or WRITE_SECONDS old, and at the end of the process. Where lines
are for people, or nobody has set up logging, they go through structlog one by one.
Must not: decide what a line says (`router.record` does), or ask for the logger's level more than once a
second.
"""

import asyncio
import logging
import sys
import time
from collections.abc import Mapping
from json.encoder import encode_basestring
from typing import Any, Final

import orjson
import structlog

from core.logging import json_fields

# Nobody who reads a log misses half a second; a crash that cannot be caught loses so much of it.
WRITE_SECONDS = 0.5
_BATCH_CHARACTERS_MAX: Final = 64 * 1024
_NAME = "router.access"
_log = structlog.get_logger(_NAME)

# What stands behind the point, by thousandths.
_FRACTIONS: Final[list[str]] = [f".{each:03d}" for each in range(1000)]


def quoted(text: str) -> str:
    """Returns a text as JSON, quotes included."""
    # What has only letters and digits, like identifiers of the router, has nothing to be escaped.
    return f'"{text}"' if text.isalnum() else encode_basestring(text)


def milliseconds(seconds: float) -> str:
    """Returns a time as JSON: in milliseconds, to the nearest microsecond."""
    if seconds == 0.0:
        return "0.0"
    # By whole numbers: rounding a float to three places costs more than all else here.
    microseconds = int(seconds * 1e6 + 0.5)
    return str(microseconds // 1000) + _FRACTIONS[microseconds % 1000]


def number(value: int | None) -> str:
    """Returns a count as JSON."""
    return "null" if value is None else str(value)


class AccessLog:
    """Writes the lines of one worker.

    Attributes:
        machine: Lines are JSON; they go through `add`, those for people through `write`.
    """

    def __init__(self) -> None:
        common = json_fields()
        self.machine = common is not None
        # The end of every line: what is the same in all of them.
        self._common = (
            ""
            if common is None
            else 'Z",'
            + orjson.dumps({**common, "message": "request"}, option=orjson.OPT_APPEND_NEWLINE).decode()[1:]
        )
        self._logger = logging.getLogger(_NAME)
        self._lines: list[str] = []
        self._characters = 0
        self._timer: asyncio.TimerHandle | None = None
        # Worked out once a second: whether lines are wanted, and what stands before their end.
        self._second = 0
        self._info = False
        self._debug = False
        self._info_text = ""
        self._debug_text = ""

    def write(self, fields: Mapping[str, Any], *, quiet: bool) -> None:
        """Logs one request for people.

        Args:
            fields: What the line says beside what every line says.
            quiet: At debug level.
        """
        (_log.debug if quiet else _log.info)("request", **fields)

    def add(self, line: str, *, quiet: bool) -> None:
        """Logs one request as JSON.

        Args:
            line: What the line says beside what every line says: an object with members, its last brace left
                out.
            quiet: At debug level.
        """
        now = time.time()
        second = int(now)
        if second != self._second:
            self._begin(second)
        if not (self._debug if quiet else self._info):
            return
        # The first digit is there to keep the zeros behind it.
        microseconds = str(int((now - second) * 1e6) + 1_000_000)[1:]
        line = f"{line}{self._debug_text if quiet else self._info_text}{microseconds}{self._common}"
        self._lines.append(line)
        self._characters += len(line)
        if self._characters > _BATCH_CHARACTERS_MAX:
            self.flush()
        elif self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(WRITE_SECONDS, self.flush)

    def flush(self) -> None:
        """Writes what is waiting."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        lines, self._lines, self._characters = self._lines, [], 0
        if lines:
            sys.stderr.write("".join(lines))
            sys.stderr.flush()

    def _begin(self, second: int) -> None:
        """Works out what holds for a second; the time is written as structlog writes it."""
        self._second = second
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))
        self._info_text = f',"level":"info","time":"{moment}.'
        self._debug_text = f',"level":"debug","time":"{moment}.'
        self._info = self._logger.isEnabledFor(logging.INFO)
        self._debug = self._logger.isEnabledFor(logging.DEBUG)
