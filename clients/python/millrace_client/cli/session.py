"""What every command shares: the common options, the connection, and where output goes.

In comes a command function whose first parameter is a `Session`; out comes the same function for typer
with the common options added behind its own, so that they may stand before or behind the command's name.
Nothing is resolved, loaded or connected before a command asks for it.
"""

import asyncio
import inspect
import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, fields, replace
from enum import StrEnum
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Concatenate, ParamSpec, TypeVar

import typer

from millrace_client import errors
from millrace_client.cli import BROKEN_PIPE, silence_stdout
from millrace_client.context import Context, resolve_context

if TYPE_CHECKING:
    from millrace_client.client import MillraceClient

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")

PANEL = "Connection and output"


class OutputFormat(StrEnum):
    """How results are written."""

    TABLE = "table"
    JSON = "json"
    YAML = "yaml"


@dataclass(frozen=True, slots=True)
class CommonOptions:
    """Options that every command takes; None and False mean that it was not given."""

    namespace: Annotated[
        str | None,
        typer.Option("-n", "--namespace", help="Namespace (tenant).", rich_help_panel=PANEL, metavar="NAME"),
    ] = None
    output: Annotated[
        OutputFormat | None, typer.Option("-o", "--output", help="Output format.", rich_help_panel=PANEL)
    ] = None
    no_color: Annotated[bool, typer.Option("--no-color", help="No colours.", rich_help_panel=PANEL)] = False
    server: Annotated[
        str | None,
        typer.Option(
            help="Control plane, host:port; https://host:port for TLS.",
            rich_help_panel=PANEL,
            metavar="ADDRESS",
        ),
    ] = None
    token_file: Annotated[
        Path | None,
        typer.Option(help="File that holds the bearer token.", rich_help_panel=PANEL, metavar="FILE"),
    ] = None
    tls_authority: Annotated[
        Path | None,
        typer.Option(
            help="PEM file of the authority that signed the server's certificate.",
            rich_help_panel=PANEL,
            metavar="FILE",
        ),
    ] = None
    timeout: Annotated[
        float | None,
        typer.Option(
            help="Seconds that a call, or a --wait, may take.",
            min=0.1,
            max=86400,
            rich_help_panel=PANEL,
            metavar="SECONDS",
        ),
    ] = None
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.", rich_help_panel=PANEL)] = False

    def over(self, outer: "CommonOptions") -> "CommonOptions":
        """Lays these options over those that stood before the command's name."""
        given = {
            each.name: value
            for each in fields(self)
            if (value := getattr(self, each.name)) is not None and value is not False
        }
        return replace(outer, **given)


class Session:
    """One run of a command.

    Attributes:
        options: The common options.
    """

    def __init__(self, options: CommonOptions, environment: Mapping[str, str] | None = None) -> None:
        self.options = options
        self._environment = environment
        self._waiting = False

    @cached_property
    def context(self) -> Context:
        """Where to talk to."""
        return self.resolve()

    def resolve(self, *, router_url: str | None = None, api_key_file: Path | None = None) -> Context:
        """Resolves the context, with what only some commands can be given."""
        return resolve_context(
            server=self.options.server or "",
            token_file=self.options.token_file,
            tls_authority=self.options.tls_authority,
            namespace=self.options.namespace or "",
            router_url=router_url or "",
            api_key_file=api_key_file,
            environment=self._environment,
        )

    @property
    def output(self) -> OutputFormat:
        """How results are written."""
        return self.options.output or OutputFormat.TABLE

    @property
    def structured(self) -> bool:
        """True when a program reads the output."""
        return self.output is not OutputFormat.TABLE

    @property
    def call_timeouts(self) -> dict[str, float]:
        """The timeout argument of slow calls, where the user gave one."""
        return (
            {} if self.options.timeout is None or self._waiting else {"timeout_seconds": self.options.timeout}
        )

    def split_name(self, name: str) -> tuple[str, str]:
        """Splits `namespace/name`, or adds the default namespace.

        Raises:
            InvalidArgument: -n names another namespace, or a part is empty.
            ContextError: No namespace is known.
        """
        namespace, separator, rest = name.partition("/")
        if not separator:
            if not name:
                raise errors.InvalidArgument("the name is empty: write NAME or namespace/NAME")
            return self.context.require_namespace(), name
        if not namespace or not rest or "/" in rest:
            raise errors.InvalidArgument(f"`{name}` is no name: write NAME or namespace/NAME")
        if self.options.namespace and self.options.namespace != namespace:
            raise errors.InvalidArgument(
                f"`{name}` and -n {self.options.namespace} contradict each other: give one of them"
            )
        return namespace, rest

    @asynccontextmanager
    async def client(self) -> AsyncIterator["MillraceClient"]:
        """Connects to the control plane of the context."""
        from millrace_client.client import TIMEOUT_SECONDS, MillraceClient

        context = self.context
        target = context.require_target()
        try:
            client = MillraceClient.connect(
                target,
                context.token,
                tls=context.tls,
                tls_authority=context.tls_authority,
                tls_certificate=context.tls_certificate,
                tls_key=context.tls_key,
                timeout_seconds=(None if self._waiting else self.options.timeout) or TIMEOUT_SECONDS,
            )
        except OSError as error:
            raise errors.ContextError(
                f"cannot read the TLS file {error.filename}: {error.strerror}"
            ) from error
        async with client:
            yield client

    def run(
        self, work: "Callable[[MillraceClient], Coroutine[Any, Any, Result]]", *, waiting: bool = False
    ) -> Result:
        """Runs asynchronous work with a client to its end.

        While `waiting`, --timeout limits the wait as a whole and calls keep their own limits.
        """
        self._waiting = waiting

        async def connected() -> Result:
            async with self.client() as client:
                return await work(client)

        return asyncio.run(connected())

    def write(self, text: str) -> None:
        """Writes a line, or lines, to stdout at once, so that a pipe's reader sees them."""
        sys.stdout.write(text if text.endswith("\n") else text + "\n")
        sys.stdout.flush()

    def note(self, text: str) -> None:
        """Tells a person something beside the result; programs read stdout only."""
        print(text, file=sys.stderr, flush=True)

    def emit(self, data: Any) -> None:
        """Writes structured data in the chosen format."""
        from millrace_client.cli.render import dump

        self.write(dump(data, self.output))

    def emit_line(self, data: Any) -> None:
        """Writes one item of a stream: one JSON object a line, or one YAML document."""
        from millrace_client.cli.render import dump_line

        self.write(dump_line(data, self.output))

    def show(self, *renderables: Any) -> None:
        """Writes tables and texts for a person."""
        from millrace_client.cli.render import to_text

        self.write(to_text(renderables, stream=sys.stdout, color=not self.options.no_color))

    def complain(self, *renderables: Any) -> None:
        """Writes tables and texts beside the result, for a person."""
        from millrace_client.cli.render import to_text

        if renderables:
            self.note(to_text(renderables, stream=sys.stderr, color=not self.options.no_color))


def command(
    function: Callable[Concatenate[Session, Parameters], None],
) -> Callable[..., None]:
    """Makes a typer command of a function that takes a session, by adding the common options."""
    signature = inspect.signature(function, eval_str=True)
    own = [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in signature.parameters.values()][1:]

    def invoke(**arguments: Any) -> None:
        context: typer.Context = arguments.pop("typer_context")
        options = CommonOptions(**{each.name: arguments.pop(each.name) for each in fields(CommonOptions)})
        if isinstance(context.obj, CommonOptions):
            options = options.over(context.obj)
        context.obj = options
        if context.invoked_subcommand is not None:
            # A group whose command follows: it only hands its options on.
            return
        call: Callable[..., None] = function
        try:
            call(Session(options), **arguments)
        except BrokenPipeError as error:
            silence_stdout()
            raise typer.Exit(BROKEN_PIPE) from error

    parameters = [
        inspect.Parameter("typer_context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context),
        *own,
        *common_parameters(),
    ]
    invoke.__name__ = function.__name__
    # The marker keeps the lines of the examples apart in --help; in a docstring it would be noise.
    invoke.__doc__ = inspect.cleandoc(function.__doc__ or "").replace("\n\nExample", "\n\n\b\nExample")
    invoke.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    invoke.__annotations__ = {each.name: each.annotation for each in parameters}
    return invoke


def common_parameters() -> list[inspect.Parameter]:
    """The common options as parameters of a function."""
    return [
        inspect.Parameter(
            each.name, inspect.Parameter.KEYWORD_ONLY, default=each.default, annotation=each.type
        )
        for each in fields(CommonOptions)
    ]
