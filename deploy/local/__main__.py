"""Command line of the local stack: `millrace-local up` and `millrace-local down`.

`up` stays in the foreground until Ctrl-C and leaves no process behind; `down`, from another terminal,
ends it. Exit codes: 0 stopped as asked, 1 could not start, 2 wrong options.
"""

import argparse
import asyncio
import fcntl
import os
import shlex
import signal
import sys
import time
from collections.abc import Sequence
from typing import IO

from core.errors import MillraceError
from core.tasks import cancel_and_wait, stop_on_signals
from deploy.local import engine_environment
from deploy.local.bundled import QUESTION, NotReadyError
from deploy.local.options import (
    DEPLOYMENT,
    NAMESPACE,
    Options,
    UsageError,
    add_arguments,
    from_arguments,
    require_free_ports,
)
from deploy.local.stack import Stack, StartError, running_process

DOWN_SECONDS = 90.0


def _report(line: str) -> None:
    print(f"==> {line}", flush=True)


def _lock(options: Options) -> IO[str]:
    """Takes the folder for this process.

    Raises:
        UsageError: A stack runs here already.
    """
    options.directory.mkdir(parents=True, exist_ok=True)
    file = options.lock.open("a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise UsageError(
            f"Millrace runs here already (process {running_process(options)}, state in "
            f"{options.directory}): use it, or stop it with `make down`"
        ) from None
    file.truncate(0)
    file.write(f"{os.getpid()}\n")
    file.flush()
    return file


def _show_answer(options: Options, api_key: str, answer: str) -> None:
    body = f'{{"model": "{DEPLOYMENT}", "messages": [{{"role": "user", "content": "{QUESTION}"}}]}}'
    if options.engine == "simulator":
        answer += "\n    (the simulator repeats the question; a real engine answers it)"
    print(
        f"""
    {QUESTION}
    {answer}

    endpoint  {options.router_url}/v1
    model     {DEPLOYMENT}   (namespace {NAMESPACE}, engine {options.engine})
    key       {api_key}
    logs      {options.logs}   engines: {options.directory / "nodeagent" / "logs"}

    curl -s {options.router_url}/v1/chat/completions \\
      -H 'Authorization: Bearer {api_key}' \\
      -H 'Content-Type: application/json' \\
      -d {shlex.quote(body)}

    Millrace runs in the foreground. Ctrl-C stops it and everything it started.
""",
        flush=True,
    )


async def _bring_up(stack: Stack, options: Options) -> None:
    await stack.start()
    if options.no_deployment:
        return
    model = stack.bundled_model()
    declared = await model.declare()
    stack.declared(declared)
    await model.wait_ready()
    _show_answer(options, declared.api_key, await model.ask(declared.api_key))


async def _up(options: Options) -> int:
    stop = stop_on_signals()
    stack = Stack(options, _report)
    stopper = asyncio.create_task(stop.wait(), name="stop-signal")
    work = asyncio.create_task(_bring_up(stack, options), name="bring-up")
    code = 0
    try:
        await asyncio.wait([work, stopper], return_when=asyncio.FIRST_COMPLETED)
        if work.done():
            work.result()
            work = asyncio.create_task(stack.watch(), name="watch")
            await asyncio.wait([work, stopper], return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                work.result()
    except (StartError, NotReadyError, MillraceError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        code = 1
    finally:
        await cancel_and_wait(work, stopper)
        await stack.stop()
    _report("stopped")
    return code


def _down(options: Options) -> int:
    process = running_process(options)
    if process is None:
        print(f"nothing runs in {options.directory}")
        return 0
    os.kill(process, signal.SIGTERM)
    deadline = time.monotonic() + DOWN_SECONDS
    while running_process(options) is not None:
        if time.monotonic() > deadline:
            print(f"error: process {process} still runs after {DOWN_SECONDS:g} s", file=sys.stderr)
            return 1
        time.sleep(0.1)
    print("stopped")
    return 0


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(
        prog="millrace-local", description="A whole Millrace on this machine, in the foreground."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    add_arguments(commands.add_parser("up", help="start everything and ask the bundled model a question"))
    add_arguments(commands.add_parser("down", help="stop what `up` started, from another terminal"))
    parsed = parser.parse_args(arguments)
    try:
        options = from_arguments(parsed)
        if parsed.command == "down":
            sys.exit(_down(options))
        with _lock(options):
            require_free_ports(options)
            if options.engine == "vllm" and not options.no_deployment:
                engine_environment.ensure(options.engines)
            sys.exit(asyncio.run(_up(options)))
    except (UsageError, engine_environment.InstallError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
