"""`millrace up` and `millrace down`: a whole Millrace on this machine.

In come options that this module does not look at; the process becomes `millrace-local`, the program of
the server distribution that knows them. It must not import anything of the server.
"""

import os
import shutil
import sys
from pathlib import Path
from typing import NoReturn

import typer

from millrace_client import errors

PROGRAM = "millrace-local"
_PASS_THROUGH = {"allow_extra_args": True, "ignore_unknown_options": True}


def up(context: typer.Context) -> None:
    """Start a whole Millrace on this machine; `millrace up --help` lists the options."""
    _become(["up", *context.args])


def down(context: typer.Context) -> None:
    """Stop what `millrace up` started, from another terminal."""
    _become(["down", *context.args])


def register(application: typer.Typer) -> None:
    """Adds the commands; --help too is for the program behind them."""
    for function in (up, down):
        application.command(function.__name__, context_settings=_PASS_THROUGH, add_help_option=False)(
            function
        )


def _become(arguments: list[str]) -> NoReturn:
    # The program beside our own interpreter first: it belongs to the same installation.
    beside = Path(sys.executable).parent / PROGRAM
    program = str(beside) if os.access(beside, os.X_OK) else shutil.which(PROGRAM)
    if program is None:
        raise errors.ContextError(
            f"{PROGRAM} is not installed: install the `millrace` distribution (pip install millrace), or "
            "run `make up` in its repository"
        )
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(program, [program, *arguments])  # noqa: S606 - no shell; the process becomes the program
