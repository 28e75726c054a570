"""`python -m tests.chaos`: the long form; every fault, one after the other, as a table in Markdown.

    python -m tests.chaos [--only TEXT ...] [--take-over] [--list]

A second table says how long nobody decided when the leader was gone. Ends with exit code 1 where something
did not come back; then its row says what.
"""

import argparse
import asyncio
import os
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from tests.chaos.cluster import ChaosCluster, chaos_cluster
from tests.chaos.failover import WAYS, take_over
from tests.chaos.faults import FAULTS, Fault
from tests.chaos.invariants import SPEC, look
from tests.chaos.runner import converged, run_fault

COME_UP_SECONDS = 60.0


def _row(*cells: object) -> None:
    print("| " + " | ".join(str(cell) for cell in cells) + " |", flush=True)


@asynccontextmanager
async def _cluster() -> AsyncIterator[ChaosCluster]:
    with tempfile.TemporaryDirectory(prefix="millrace-chaos-") as directory:
        async with chaos_cluster(Path(directory)) as cluster:
            await converged(cluster, (await look(cluster)).below(SPEC), COME_UP_SECONDS)
            yield cluster


async def _faults(faults: list[Fault]) -> list[str]:
    """Runs faults and prints a row for each; returns what went wrong."""
    wrong: list[str] = []
    pending = list(faults)
    _row("fault", "requests", "failed", "longest gap", "slowest request", "what was lost", "time to converge")
    _row("---", "---:", "---:", "---:", "---:", "---", "---:")
    while pending:
        async with _cluster() as cluster:
            while pending:
                fault = pending.pop(0)
                problem = await _one(cluster, fault)
                if problem:
                    wrong.append(f"{fault.name}: {problem}")
                    # What comes next must not be blamed for it: it gets a cluster of its own.
                    break
    return wrong


async def _one(cluster: ChaosCluster, fault: Fault) -> str:
    """Runs one fault and prints its row; returns what went wrong, or nothing."""
    if fault.needs_root and os.geteuid() != 0:
        _row(fault.name, "", "", "", "", "not run: needs root to mount a file system", "")
        return ""
    try:
        account = await run_fault(cluster, fault)
    except AssertionError as error:
        _row(fault.name, "", "", "", "", f"**{' '.join(str(error).split())[:200]}**", "")
        return str(error)
    _row(
        account.fault,
        account.requests,
        account.failed,
        f"{account.gap_seconds:.2f} s",
        f"{account.slowest_seconds:.2f} s",
        account.lost,
        f"{account.converge_seconds:.1f} s",
    )
    for text in account.errors:
        sys.stderr.write(f"{account.fault}: {text}\n")
    return ""


async def _take_overs() -> list[str]:
    """Takes the leader away in every way and prints how long nobody decided."""
    print("\nThe leader is gone; seconds until another decides\n")
    _row("how", "elected", "first replica assigned", "all assigned", "requests", "failed")
    _row("---", "---:", "---:", "---:", "---:", "---:")
    wrong: list[str] = []
    async with _cluster() as cluster:
        for way in WAYS:
            try:
                taken = await take_over(cluster, way)
            except AssertionError as error:
                wrong.append(f"{way}: {error}")
                break
            seconds = (f"{each:.2f} s" for each in (taken.elected, taken.assigned, taken.replaced))
            _row(way, *seconds, taken.requests, taken.failed)
    return wrong


def main() -> int:
    """Runs the faults that were asked for; 0 when all came back."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[], metavar="TEXT", help="faults whose name holds TEXT")
    parser.add_argument("--take-over", action="store_true", help="the second table too, whatever --only says")
    parser.add_argument("--list", action="store_true", help="name the faults and end")
    arguments = parser.parse_args()
    faults = [
        each for each in FAULTS if not arguments.only or any(text in each.name for text in arguments.only)
    ]
    if arguments.list:
        print("\n".join(each.name for each in faults))
        return 0
    wrong = asyncio.run(_faults(faults)) if faults else []
    if not arguments.only or arguments.take_over:
        wrong += asyncio.run(_take_overs())
    for each in wrong:
        sys.stderr.write(f"\n{each}\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
