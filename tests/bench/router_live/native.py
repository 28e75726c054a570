"""Builds the load client and the canned engine from their C sources, once for each state of the sources.

In: `tests/bench/native/*.c` and a C compiler. Out: paths of programs under `.millrace/bench/native`.
Python is no load generator for a router that takes tens of thousands of requests a second on one core.
Must not: leave a half-written program behind, or go on without a compiler.
"""

import hashlib
import os
import shutil
import subprocess
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[3]
SOURCES = REPOSITORY / "tests" / "bench" / "native"
BENCH_DIRECTORY = REPOSITORY / ".millrace" / "bench"
_FLAGS = ("-O2", "-std=gnu11", "-Wall", "-Wextra", "-Werror")


class Unavailable(Exception):
    """Something that a row of a table needs is not here; the text says what and how to get it."""


def build(name: str) -> Path:
    """Returns the program `name`, compiled from `name.c`.

    Raises:
        Unavailable: There is no compiler, or it refused the source.
    """
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        raise Unavailable("no C compiler: install gcc (apt install gcc libc6-dev) or set CC")
    source = SOURCES / f"{name}.c"
    digest = hashlib.sha256()
    for path in (source, SOURCES / "common.h"):
        digest.update(path.read_bytes())
    program = BENCH_DIRECTORY / "native" / f"{name}-{digest.hexdigest()[:12]}"
    if not program.exists():
        program.parent.mkdir(parents=True, exist_ok=True)
        partial = program.with_suffix(f".{os.getpid()}")
        outcome = subprocess.run(
            [compiler, *_FLAGS, "-o", str(partial), str(source)], capture_output=True, text=True, check=False
        )
        if outcome.returncode != 0:
            raise Unavailable(f"{compiler} refused {source.name}:\n{outcome.stderr[-2000:]}")
        partial.replace(program)
    return program
