"""The tree of commands: which module answers to which name.

In comes nothing; out comes the typer application. Each group of commands lives in a module of its own and
takes a `Session`; here they only get their names, their order, and the options that may stand before them.
"""

import inspect
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import typer

from millrace_client.cli import local, namespaces, nodes, plan, rollout
from millrace_client.cli.apply import apply
from millrace_client.cli.chat import chat
from millrace_client.cli.describe import describe
from millrace_client.cli.get import get
from millrace_client.cli.lifecycle import delete, scale
from millrace_client.cli.session import CommonOptions, common_parameters
from millrace_client.cli.streams import events, logs
from millrace_client.cli.version import show_version

_HELP = """
Millrace turns a pile of machines into model endpoints.

Declare a model, and talk to it:

\b
  millrace up                             start a whole Millrace on this machine
  millrace size Qwen/Qwen2.5-7B-Instruct  see what a model needs; no cluster is asked
  millrace plan qwen.json                 see where it would run, and who would make room
  millrace apply -f qwen.json --wait      declare a model and wait until it answers
  millrace chat qwen -m "Hello"           talk to it
  millrace describe qwen                  see what it needs, where it runs, and why
  millrace logs qwen -f                   follow its engine's log
  millrace rollout status qwen            see how a change comes on

Where to: --server and --token-file, or MILLRACE_SERVER and MILLRACE_TOKEN, or .millrace/local.json of
this folder or a parent, which `millrace up` writes.

Exit codes: 1 failure, 2 wrong usage, 3 not found, 4 refused credential, 5 unreachable, 130 Ctrl-C.
"""

application = typer.Typer(
    name="millrace",
    help=_HELP,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)


def _root() -> Callable[..., None]:
    """Takes the common options that stand before a command's name, and keeps them for it."""

    def root(**arguments: Any) -> None:
        context: typer.Context = arguments.pop("typer_context")
        context.obj = CommonOptions(**{each.name: arguments[each.name] for each in fields(CommonOptions)})
        if context.invoked_subcommand is None:
            typer.echo(context.get_help())

    parameters = [
        inspect.Parameter("typer_context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context),
        *common_parameters(),
    ]
    root.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    root.__annotations__ = {each.name: each.annotation for each in parameters}
    return root


application.callback()(_root())
local.register(application)
for _function in (apply, get, describe, chat, logs, events, scale, delete):
    application.command(_function.__name__)(_function)
rollout.register(application)
namespaces.register(application)
nodes.register(application)
plan.register(application)
application.command("version")(show_version)
