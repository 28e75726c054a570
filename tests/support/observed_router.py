"""`millrace-router` that tells how many asyncio tasks it holds: on SIGUSR1 it appends a number to a file.

In: the router's own arguments, and the file's path in MILLRACE_OBSERVED. Out: the router as it is, and a line
with the number of unfinished tasks for every signal. For leak tests; must not change anything else.
"""

import asyncio
import gc
import os
import signal
import types
from pathlib import Path

from router.__main__ import main

OUTPUT_VARIABLE = "MILLRACE_OBSERVED"


def _tell(number: int, frame: types.FrameType | None) -> None:
    gc.collect()
    tasks = [each for each in gc.get_objects() if isinstance(each, asyncio.Task) and not each.done()]
    with Path(os.environ[OUTPUT_VARIABLE]).open("a", encoding="utf-8") as output:
        output.write(f"{len(tasks)}\n")


if __name__ == "__main__":
    signal.signal(signal.SIGUSR1, _tell)
    main()
