"""`python -m tests.chaos`: the long form; every fault on one cluster, one after the other, as a Markdown table.

    python -m tests.chaos [--only TEXT ...] [--list]

Ends with exit code 1 where something did not come back; then its row says what.
"""

import argparse
import asyncio
import os
import sys
import tempfile
from pathlib import Path

from tests.chaos.cluster import chaos_cluster
from tests.chaos.faults import FAULTS, Fault
from tests.chaos.invariants import SPEC, look
from tests.chaos.runner import converged, run_fault

COME_UP_SECONDS = 60.0


def _row(*cells: object) -> None:
    print("| " + " | ".join(str(cell) for cell in cells) + " |", flush=True)


async def _run(faults: list[Fault]) -> list[str]:
    """Runs faults and prints a row for each; returns what went wrong."""
    wrong: list[str] = []
    with tempfile.TemporaryDirectory(prefix="millrace-chaos-") as directory:
        async with chaos_cluster(Path(directory)) as cluster:
            await converged(cluster, (await look(cluster)).below(SPEC), COME_UP_SECONDS)
            _row(
                "fault",
                "requests",
                "failed",
                "longest gap",
                "slowest request",
                "what was lost",
                "time to converge",
            )
            _row("---", "---:", "---:", "---:", "---:", "---", "---:")
            for fault in faults:
                if fault.needs_root and os.geteuid() != 0:
                    _row(fault.name, "", "", "", "", "not run: needs root to mount a file system", "")
                    continue
                try:
                    account = await run_fault(cluster, fault)
                except AssertionError as error:
                    wrong.append(f"{fault.name}: {error}")
                    _row(fault.name, "", "", "", "", f"**{str(error).splitlines()[0]}**", "")
                    # What comes next must not be blamed for it.
                    break
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
    return wrong


def main() -> int:
    """Runs the faults that were asked for; 0 when all came back."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[], metavar="TEXT", help="faults whose name holds TEXT")
    parser.add_argument("--list", action="store_true", help="name the faults and end")
    arguments = parser.parse_args()
    faults = [
        each for each in FAULTS if not arguments.only or any(text in each.name for text in arguments.only)
    ]
    if arguments.list:
        print("\n".join(each.name for each in faults))
        return 0
    wrong = asyncio.run(_run(faults))
    for each in wrong:
        sys.stderr.write(f"\n{each}\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
