"""`millrace-nodeagent`: reads options, sets up logging, runs the agent until a signal."""

import asyncio
import sys
from collections.abc import Sequence
from typing import NoReturn

import pydantic
from pydantic_settings import CliApp, SettingsError

from core import errors, logging
from core.tasks import stop_on_signals
from nodeagent.agent import Agent
from nodeagent.settings import AgentSettings

_PROGRAM = "millrace-nodeagent"


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the agent.

    Exit codes: 0 after a signal, 1 when it cannot go on, 2 for a wrong option.
    """
    settings = _read_settings(sys.argv[1:] if arguments is None else list(arguments))
    logging.configure(service="nodeagent", level=settings.log_level, style=settings.log_style)
    runner = asyncio.Runner(loop_factory=_loop_factory())
    try:
        with runner:
            runner.run(_run(settings))
    except errors.InvalidArgument as error:
        _exit(2, error.message)
    except errors.MillraceError as error:
        _exit(1, error.message)


async def _run(settings: AgentSettings) -> None:
    stop = stop_on_signals()
    await Agent(settings).run(stop)


def _read_settings(arguments: list[str]) -> AgentSettings:
    try:
        return CliApp.run(AgentSettings, cli_args=arguments)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        option = "--" + "-".join(str(part) for part in first["loc"]).replace("_", "-") if first["loc"] else ""
        message = first["msg"].removeprefix("Value error, ")
        _exit(2, f"{option}: {message}".removeprefix(": "))
    except (SettingsError, errors.InvalidArgument) as error:
        _exit(2, str(error))


def _loop_factory() -> "type[asyncio.AbstractEventLoop] | None":
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.Loop


def _exit(code: int, message: str) -> NoReturn:
    sys.stderr.write(f"{_PROGRAM}: {message}\n")
    raise SystemExit(code)


if __name__ == "__main__":
    main()
