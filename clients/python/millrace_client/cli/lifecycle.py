"""`millrace scale` and `millrace delete`: change how much of a deployment there is.

In comes a name, out comes what was changed; with --wait the command stays until it is true. Deleting asks
first where a person sits in front of it.
"""

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from millrace_client import errors
from millrace_client.cli.session import Session, command

if TYPE_CHECKING:
    from millrace_client.client import MillraceClient

DeploymentName = Annotated[str, typer.Argument(help="Deployment; may be written namespace/name.")]


@command
def scale(
    session: Session,
    name: DeploymentName,
    replicas: Annotated[int, typer.Option(help="How many; 0 stops the deployment.", min=0, max=1000)],
    wait: Annotated[bool, typer.Option("--wait", help="Wait until they serve.")] = False,
) -> None:
    """Set the number of replicas.

    Examples:
      millrace scale qwen --replicas 2 --wait
      millrace scale team-ai/qwen --replicas 0
    """
    from millrace_client.cli.render import message_data

    key = session.split_name(name)

    async def work(client: "MillraceClient") -> None:
        deployment = await client.scale(*key, replicas)
        if not session.structured:
            session.write(f"{'/'.join(key)} scaled to {replicas}")
            if deployment.spec.HasField("autoscale") and replicas:
                session.note("its autoscaler goes on from there: the number follows the load")
        try:
            if wait:
                from millrace_client.cli.progress import (
                    WAIT_SECONDS,
                    failure_report,
                    progress_view,
                    wait_ready,
                )

                with progress_view(color=not session.options.no_color) as view:
                    result = await wait_ready(
                        client,
                        {key: deployment.generation},
                        view,
                        timeout_seconds=session.options.timeout or WAIT_SECONDS,
                    )
                deployment = result.states[key] or deployment
                session.complain(*failure_report(result))
                result.raise_failure()
        finally:
            if session.structured:
                session.emit(message_data(deployment))

    session.run(work, waiting=wait)


@command
def delete(
    session: Session,
    name: DeploymentName,
    wait: Annotated[bool, typer.Option("--wait", help="Wait until its replicas have stopped.")] = False,
    ignore_not_found: Annotated[
        bool, typer.Option("--ignore-not-found", help="Succeed when there is none.")
    ] = False,
    yes: Annotated[bool, typer.Option("-y", "--yes", help="Do not ask.")] = False,
) -> None:
    """Delete a deployment and its keys; running requests end first.

    Examples:
      millrace delete qwen
      millrace delete team-ai/qwen --yes --wait --ignore-not-found
    """
    key = session.split_name(name)
    label = "/".join(key)
    if not yes and sys.stdin.isatty() and not typer.confirm(f"Delete {label} and its keys?", err=True):
        raise errors.FailedPrecondition(f"{label} was not deleted")

    async def work(client: "MillraceClient") -> str:
        try:
            # Once it is deleted nobody knows its replicas by its name.
            replicas = [each.replica for each in (await client.get(*key)).status.replicas] if wait else []
            await client.delete(*key)
        except errors.NotFound:
            if not ignore_not_found:
                raise
            return "absent"
        if wait:
            from millrace_client.cli.progress import WAIT_SECONDS, wait_stopped

            await wait_stopped(client, replicas, timeout_seconds=session.options.timeout or WAIT_SECONDS)
        return "deleted"

    outcome = session.run(work, waiting=wait)
    if session.structured:
        session.emit({"namespace": key[0], "name": key[1], "result": outcome})
    else:
        session.write(f"{label} {'deleted' if outcome == 'deleted' else 'does not exist'}")
