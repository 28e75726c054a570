"""Entry point of the simulator: `python -m nodeagent.engines.simulator`.

In: argv. Out: the process's exit code. What is heavy is imported after the command line is read,
so that a wrong flag or `--fail-at-start` answers at once.
Must not: contain behaviour of its own.
"""

import sys
from collections.abc import Sequence

from nodeagent.engines.simulator.flags import parse_settings

_START_FAILURE = """\
ERROR [core.py] EngineCore failed to start.
Traceback (most recent call last):
RuntimeError: Engine core initialization failed: simulated failure (--fail-at-start).
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one simulator until it is stopped.

    Args:
        argv: Arguments without the program's name; None reads the process's own.

    Returns:
        0 after a signal, 1 if the start failed or the engine died.
    """
    settings = parse_settings(argv)
    if settings.faults.fail_at_start:
        sys.stderr.write(_START_FAILURE)
        return 1
    import asyncio

    from nodeagent.engines.simulator.process import SimulatorProcess

    async def run() -> int:
        return await SimulatorProcess(settings).run()

    try:
        return asyncio.run(run())
    except OSError as error:
        sys.stderr.write(f"ERROR: cannot listen on {settings.host}:{settings.port}: {error.strerror}\n")
        return 1


if __name__ == "__main__":
    sys.exit(main())
