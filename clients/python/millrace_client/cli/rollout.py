"""`millrace rollout`: how a change of a running deployment comes on, and what to do when it does not.

In comes a name; out comes how far the spec's launch generation has come, or what was changed. `undo` writes
the spec that served before: a change like any other, made by the user.
"""

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Annotated

import typer

from millrace_client import errors
from millrace_client.cli.lifecycle import DeploymentName
from millrace_client.cli.session import Session, command

if TYPE_CHECKING:
    from millrace.core.v1.deployment_pb2 import Deployment

    from millrace_client.client import MillraceClient

# Of a spec, what engines are started from: the rest is not a matter of roll-outs.
LAUNCH_FIELDS = ("model", "engine", "quantization", "max_model_len", "extra_args")

Wait = Annotated[bool, typer.Option("--wait", help="Wait until it is complete, or was rolled back.")]

group = typer.Typer(
    rich_markup_mode=None,
    no_args_is_help=True,
    help="See how a change comes on, take it back, or replace every replica.",
)


@group.command("status")
@command
def status(session: Session, name: DeploymentName, wait: Wait = False) -> None:
    """Show how far the present spec has come.

    Examples:
      millrace rollout status qwen
      millrace rollout status team-ai/qwen --wait
    """

    async def current(client: "MillraceClient", key: tuple[str, str]) -> "Deployment":
        return await client.get(*key)

    _run(session, name, current, wait=wait)


@group.command("restart")
@command
def restart(session: Session, name: DeploymentName, wait: Wait = False) -> None:
    """Replace every replica by a new one of the same spec; also tries a spec again that was rolled back.

    Example:
      millrace rollout restart qwen --wait
    """

    async def restarted(client: "MillraceClient", key: tuple[str, str]) -> "Deployment":
        deployment = await client.restart(*key)
        if not session.structured:
            session.write(f"{'/'.join(key)} restarts")
        return deployment

    _run(session, name, restarted, wait=wait)


@group.command("undo")
@command
def undo(session: Session, name: DeploymentName, wait: Wait = False) -> None:
    """Go back to the spec that served before: model, engine, quantization, context and arguments.

    Example:
      millrace rollout undo qwen --wait
    """

    async def undone(client: "MillraceClient", key: tuple[str, str]) -> "Deployment":
        deployment = await client.get(*key)
        rollout = deployment.status.rollout
        if not rollout.HasField("previous_spec"):
            raise errors.FailedPrecondition(f"{'/'.join(key)} has no earlier spec that has served")
        changed = await client.update(
            deployment.namespace,
            deployment.name,
            rollout.previous_spec,
            fields=LAUNCH_FIELDS,
            etag=deployment.etag,
            validate_only=False,
            **session.call_timeouts,
        )
        if not session.structured:
            session.write(f"{'/'.join(key)} goes back to the spec that served before")
        return changed

    _run(session, name, undone, wait=wait)


def register(application: typer.Typer) -> None:
    """Adds the commands."""
    application.add_typer(group, name="rollout")


def _run(
    session: Session,
    name: str,
    begin: "Callable[[MillraceClient, tuple[str, str]], Awaitable[Deployment]]",
    *,
    wait: bool,
) -> None:
    from millrace_client.cli.render import message_data

    key = session.split_name(name)

    async def work(client: "MillraceClient") -> None:
        deployment = await begin(client, key)
        try:
            if wait:
                deployment = await _waited(session, client, key, deployment)
        finally:
            if session.structured:
                session.emit(message_data(deployment))
            else:
                session.write(_sentence(deployment))

    session.run(work, waiting=wait)


async def _waited(
    session: Session, client: "MillraceClient", key: tuple[str, str], deployment: "Deployment"
) -> "Deployment":
    from millrace_client.cli.progress import WAIT_SECONDS, failure_report, progress_view, wait_ready

    with progress_view(color=not session.options.no_color) as view:
        result = await wait_ready(
            client,
            {key: deployment.generation},
            view,
            timeout_seconds=session.options.timeout or WAIT_SECONDS,
        )
    session.complain(*failure_report(result))
    result.raise_failure()
    return result.states[key] or deployment


def _sentence(deployment: "Deployment") -> str:
    """What the Progressing condition says; what is known without it before the scheduler has looked."""
    name = f"{deployment.namespace}/{deployment.name}"
    status = deployment.status
    if status.observed_generation != deployment.generation:
        return f"{name}: generation {deployment.generation} has not been looked at yet"
    for each in status.conditions:
        if each.type == "Progressing":
            return f"{name}: {each.reason}: {each.message}"
    return f"{name}: nothing is known of its roll-out"
