"""`millrace-controlplane`: reads options, sets up logging, runs the control plane until a signal."""

import sys
from collections.abc import Sequence

from controlplane.process import ControlPlane
from controlplane.settings import ControlPlaneSettings
from core import errors, logging
from core.settings import event_loop_runner, give_up, read_settings
from core.tasks import stop_on_signals

_PROGRAM = "millrace-controlplane"


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the control plane.

    Exit codes: 0 after a signal, 1 when it cannot go on (a port is taken), 2 for a wrong option.
    """
    settings = read_settings(ControlPlaneSettings, sys.argv[1:] if arguments is None else arguments)
    logging.configure(service="controlplane", level=settings.log_level, style=settings.log_style)
    try:
        with event_loop_runner() as runner:
            runner.run(_run(settings))
    except errors.InvalidArgument as error:
        give_up(_PROGRAM, 2, error.message)
    except errors.MillraceError as error:
        give_up(_PROGRAM, 1, error.message)


async def _run(settings: ControlPlaneSettings) -> None:
    await ControlPlane(settings).run(stop_on_signals())


if __name__ == "__main__":
    main()
