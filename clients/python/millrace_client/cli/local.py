"""Commands that need no cluster: `millrace up`, `down`, `size` and `autoscale replay`.

In come options that this module does not look at; the process becomes `millrace-local`, `millrace-size` or
`millrace-autoscale`, the programs of the server distribution that know them. It must not import anything of
the server.
"""

import os
import shutil
import sys
from pathlib import Path
from typing import NoReturn

import typer

from millrace_client import errors

PROGRAM = "millrace-local"
SIZE_PROGRAM = "millrace-size"
AUTOSCALE_PROGRAM = "millrace-autoscale"
_PASS_THROUGH = {"allow_extra_args": True, "ignore_unknown_options": True}


def up(context: typer.Context) -> None:
    """Start a whole Millrace on this machine; `millrace up --help` lists the options."""
    _become(PROGRAM, ["up", *context.args])


def down(context: typer.Context) -> None:
    """Stop what `millrace up` started, from another terminal."""
    _become(PROGRAM, ["down", *context.args])


def size(context: typer.Context) -> None:
    """Show what a model needs and on which GPUs it fits; `millrace size --help` lists the options."""
    _become(SIZE_PROGRAM, context.args)


def autoscale(context: typer.Context) -> None:
    """Try an autoscale policy on a series; `millrace autoscale replay --help` lists the options."""
    _become(AUTOSCALE_PROGRAM, context.args)


def register(application: typer.Typer) -> None:
    """Adds the commands; --help too is for the program behind them."""
    for function in (up, down, size, autoscale):
        application.command(function.__name__, context_settings=_PASS_THROUGH, add_help_option=False)(
            function
        )


def _become(name: str, arguments: list[str]) -> NoReturn:
    # The program beside our own interpreter first: it belongs to the same installation.
    beside = Path(sys.executable).parent / name
    program = str(beside) if os.access(beside, os.X_OK) else shutil.which(name)
    if program is None:
        raise errors.ContextError(
            f"{name} is not installed: install the `millrace` distribution (pip install millrace), or "
            "run `make up` in its repository"
        )
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(program, [program, *arguments])  # noqa: S606 - no shell; the process becomes the program
