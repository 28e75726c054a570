"""`millrace-nodeagent`: reads options, sets up logging, runs the agent until a signal."""

import sys
from collections.abc import Sequence

from core import errors, logging
from core.settings import event_loop_runner, give_up, read_settings
from core.tasks import stop_on_signals
from nodeagent.agent import Agent
from nodeagent.settings import AgentSettings

_PROGRAM = "millrace-nodeagent"


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the agent.

    Exit codes: 0 after a signal, 1 when it cannot go on (a port is taken), 2 for a wrong option.
    """
    settings = read_settings(AgentSettings, sys.argv[1:] if arguments is None else arguments)
    logging.configure(service="nodeagent", level=settings.log_level, style=settings.log_style)
    try:
        with event_loop_runner() as runner:
            runner.run(_run(settings))
    except errors.InvalidArgument as error:
        give_up(_PROGRAM, 2, error.message)
    except errors.MillraceError as error:
        give_up(_PROGRAM, 1, error.message)


async def _run(settings: AgentSettings) -> None:
    await Agent(settings).run(stop_on_signals())


if __name__ == "__main__":
    main()
