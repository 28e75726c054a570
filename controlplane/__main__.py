"""`millrace-controlplane`: reads options, sets up logging, runs the control plane until a signal."""

import asyncio
import sys
from collections.abc import Sequence
from typing import NoReturn

import pydantic
from pydantic_settings import CliApp, SettingsError

from controlplane.process import ControlPlane
from controlplane.settings import ControlPlaneSettings
from core import errors, logging
from core.tasks import stop_on_signals

_PROGRAM = "millrace-controlplane"


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the control plane.

    Exit codes: 0 after a signal, 1 when it cannot go on (a port is taken), 2 for a wrong option.
    """
    settings = _read_settings(sys.argv[1:] if arguments is None else list(arguments))
    logging.configure(service="controlplane", level=settings.log_level, style=settings.log_style)
    try:
        with asyncio.Runner(loop_factory=_loop_factory()) as runner:
            runner.run(_run(settings))
    except errors.InvalidArgument as error:
        _exit(2, error.message)
    except errors.MillraceError as error:
        _exit(1, error.message)


async def _run(settings: ControlPlaneSettings) -> None:
    stop = stop_on_signals()
    await ControlPlane(settings).run(stop)


def _read_settings(arguments: list[str]) -> ControlPlaneSettings:
    try:
        return CliApp.run(ControlPlaneSettings, cli_args=arguments)
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
