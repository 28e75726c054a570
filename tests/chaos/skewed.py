"""Runs a Millrace process whose wall clock a test can set: `python -m tests.chaos.skewed MODULE ARGUMENTS`.

The offset in seconds stands in the file named by MILLRACE_TEST_CLOCK_OFFSET and is read at every look at the
clock, so that time jumps while the process runs. The monotonic clock is left alone, as a real jump leaves it.
"""

import os
import runpy
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

from core.clock import SystemClock

VARIABLE = "MILLRACE_TEST_CLOCK_OFFSET"


def _now(_self: SystemClock) -> datetime:
    path = Path(os.environ[VARIABLE])
    text = path.read_text().strip() if path.exists() else ""
    return datetime.now(UTC) + timedelta(seconds=float(text or 0))


if __name__ == "__main__":
    SystemClock.now = _now  # type: ignore[method-assign, assignment]  # the seam of all stamps
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
