"""The command line `millrace`: entry point, exit codes and the one line that an error gets.

In come the arguments of the process, out comes an exit code: 0 done, 1 failure, 2 wrong usage, 3 not
found, 4 refused credential, 5 unreachable, 130 Ctrl-C, 141 the reader of a pipe went away. Errors leave
as one line on stderr with the remedy; a traceback is shown only with `--debug` or MILLRACE_DEBUG=1. It
must not load gRPC, rich or httpx: commands do that when they run, so that `--help` is quick.
"""

import os
import sys
from collections.abc import Sequence
from typing import NoReturn, Protocol, runtime_checkable

from millrace_client import errors

FAILURE, USAGE, NOT_FOUND, REFUSED, UNREACHABLE, INTERRUPTED, BROKEN_PIPE = 1, 2, 3, 4, 5, 130, 141

# First match wins. What follows the message is the remedy, where the message cannot know it.
_OUTCOMES: tuple[tuple[type[errors.MillraceError], int, str], ...] = (
    (errors.ContextError, USAGE, ""),
    (errors.NotFound, NOT_FOUND, " (`millrace get` lists what there is)"),
    (errors.Unauthenticated, REFUSED, " (give --token-file FILE or set MILLRACE_TOKEN)"),
    (errors.PermissionDenied, REFUSED, " (use a token with a larger role)"),
    (errors.DeadlineExceeded, UNREACHABLE, " (give it longer with --timeout SECONDS)"),
    (errors.Unavailable, UNREACHABLE, " (is it running? `make up` starts one, --server names another)"),
    (errors.Conflict, FAILURE, " (it changed meanwhile: run the command again)"),
    (errors.ServerFault, FAILURE, " (the control plane's log has the details)"),
)


@runtime_checkable
class _UsageError(Protocol):
    """What typer raises for arguments that it cannot parse; the class itself is private to it."""

    exit_code: int

    def format_message(self) -> str: ...


def main() -> NoReturn:
    """Runs the command line of this process and exits."""
    sys.exit(execute(sys.argv[1:]))


def execute(arguments: Sequence[str]) -> int:
    """Runs one command line and returns its exit code."""
    from typer import Abort, Exit
    from typer.main import get_command

    from millrace_client.cli.application import application

    try:
        outcome = get_command(application).main(
            args=list(arguments), prog_name="millrace", standalone_mode=False
        )
        sys.stdout.flush()
        return outcome if isinstance(outcome, int) else 0
    except Exit as request:
        return request.exit_code
    except BrokenPipeError:
        silence_stdout()
        return BROKEN_PIPE
    except (KeyboardInterrupt, Abort):
        return INTERRUPTED
    except Exception as error:
        if _debugging(arguments):
            raise
        code, line = describe_error(error)
        print(f"error: {line}", file=sys.stderr)
        return code


def describe_error(error: Exception) -> tuple[int, str]:
    """Returns the exit code and the one line for an error."""
    if isinstance(error, errors.MillraceError):
        message = one_line(error.message)
        for kind, code, remedy in _OUTCOMES:
            if isinstance(error, kind):
                return code, message + ("" if message.endswith(")") else _fitting(remedy, error))
        return FAILURE, message
    if isinstance(error, _UsageError):
        path = getattr(getattr(error, "ctx", None), "command_path", "millrace")
        # Typer names the class of the cause, which tells a user nothing.
        text = one_line(error.format_message()).replace("Value error, ", "")
        return USAGE, f"{text} (see `{path} --help`)"
    if isinstance(error, OSError):
        return FAILURE, one_line(str(error))
    text = one_line(f"{type(error).__name__}: {error}")
    return FAILURE, f"{text} (this is a bug in the command line; --debug shows where)"


def _fitting(remedy: str, error: errors.MillraceError) -> str:
    if isinstance(error, errors.NotFound) and "node" in error.metadata:
        return " (`millrace nodes` lists what there is)"
    return remedy


def one_line(text: str) -> str:
    """Joins the lines of a text, without characters that move a terminal's cursor."""
    joined = " ".join(text.split())
    return "".join(character for character in joined if character.isprintable())


def silence_stdout() -> None:
    """Makes what is still buffered for a reader that went away end nowhere, without a complaint."""
    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, sys.stdout.fileno())
    os.close(devnull)


def _debugging(arguments: Sequence[str]) -> bool:
    return "--debug" in arguments or os.environ.get("MILLRACE_DEBUG", "") not in {"", "0"}
