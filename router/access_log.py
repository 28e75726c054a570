"""One line in the log for each request, at a fraction of what the log of everything else costs a line.

In come closed accounts of requests, out go JSON lines with the fields that every line of the process has, in
batches: a batch is written when it is large or WRITE_SECONDS old, and at the end of the process. Where lines
are for people, or nobody has set up logging, they go through structlog one by one.
"""

import asyncio
import logging
import sys
import time
from collections.abc import Mapping
from typing import Any

import orjson
import structlog

from core.logging import json_fields

# Nobody who reads a log misses half a second; a crash that cannot be caught loses so much of it.
WRITE_SECONDS = 0.5
_BATCH_BYTES_MAX = 64 * 1024

_NAME = "router.access"
_log = structlog.get_logger(_NAME)


class AccessLog:
    """Writes the lines of one worker."""

    def __init__(self) -> None:
        common = json_fields()
        # The end of every line: what is the same in all of them.
        self._common = (
            None
            if common is None
            else b"," + orjson.dumps({**common, "message": "request"}, option=orjson.OPT_APPEND_NEWLINE)[1:]
        )
        self._logger = logging.getLogger(_NAME)
        self._lines: list[bytes] = []
        self._size_bytes = 0
        self._timer: asyncio.TimerHandle | None = None
        self._second = 0
        self._second_text = ""

    def write(self, fields: Mapping[str, Any], *, quiet: bool) -> None:
        """Logs one request.

        Args:
            fields: What the line says beside what every line says; values that JSON knows.
            quiet: At debug level.
        """
        common = self._common
        if common is None:
            (_log.debug if quiet else _log.info)("request", **fields)
            return
        if not self._logger.isEnabledFor(logging.DEBUG if quiet else logging.INFO):
            return
        line = b'%b,"level":"%b","time":"%b"%b' % (
            orjson.dumps(fields)[:-1],
            b"debug" if quiet else b"info",
            self._time().encode(),
            common,
        )
        self._lines.append(line)
        self._size_bytes += len(line)
        if self._size_bytes > _BATCH_BYTES_MAX:
            self.flush()
        elif self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(WRITE_SECONDS, self.flush)

    def flush(self) -> None:
        """Writes what is waiting."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        lines, self._lines, self._size_bytes = self._lines, [], 0
        if lines:
            sys.stderr.write(b"".join(lines).decode())
            sys.stderr.flush()

    def _time(self) -> str:
        """Returns the present time as structlog writes it; the part up to the second is worked out once."""
        now = time.time()
        second = int(now)
        if second != self._second:
            self._second = second
            self._second_text = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))
        return f"{self._second_text}.{int((now - second) * 1e6):06d}Z"
