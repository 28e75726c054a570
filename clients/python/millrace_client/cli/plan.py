"""`millrace plan`: what a declaration would take, whom it would pre-empt, and why; nothing is changed.

In come the files that `apply` takes, out come the places that the scheduler would choose now. It asks the
control plane, which plans with its own scheduler; nothing here decides anything.
"""

from typing import TYPE_CHECKING, Annotated

import typer

from millrace_client import errors
from millrace_client.cli.session import Session, command

if TYPE_CHECKING:
    from millrace.scheduler.v1.scheduler_service_pb2 import PlannedDeployment

    from millrace_client.cli.documents import Document
    from millrace_client.client import MillraceClient

Planned = tuple[str, "PlannedDeployment"]
"""Namespace, and the answer for one entry."""


@command
def plan(
    session: Session,
    files: Annotated[
        list[str],
        typer.Argument(help="JSON or YAML files, - for stdin.", metavar="FILE...", show_default=False),
    ],
) -> None:
    """Show what files would take: nodes, devices, bytes, and who would have to make room.

    Examples:
      millrace plan qwen.json
      millrace plan team.yaml -n team-ai -o json

    Nothing is written. Another declaration in between may change the outcome.
    """
    from millrace_client.cli.documents import read_documents
    from millrace_client.cli.render import message_data

    documents = read_documents(files)
    found = session.run(lambda client: _plan(session, client, documents))
    if session.structured:
        data = [{"namespace": namespace, **message_data(each)} for namespace, each in found]
        session.emit({"deployments": data})
        return
    for namespace, each in found:
        _show(session, namespace, each)


async def _plan(session: Session, client: "MillraceClient", documents: "list[Document]") -> list[Planned]:
    found: list[Planned] = []
    for document in documents:
        namespace = session.options.namespace or document.namespace or session.context.namespace
        try:
            response = await client.plan(
                [entry.message() for entry in document.models], namespace=namespace, **session.call_timeouts
            )
        except (errors.InvalidArgument, errors.FailedPrecondition) as error:
            error.message = f"{document.source}: {error.message}"
            raise
        found += [(namespace, each) for each in response.deployments]
    return found


def _show(session: Session, namespace: str, planned: "PlannedDeployment") -> None:
    from millrace_client.cli.render import bytes_text, table

    name = f"{namespace}/{planned.name}" if namespace else planned.name
    session.write(f"{name} would be {'updated' if planned.exists else 'created'}: {planned.sizing.summary}")
    rows: list[tuple[str, ...]] = []
    for replica in planned.replicas:
        devices = ", ".join(f"{each.device_id} {bytes_text(each.memory_bytes)}" for each in replica.devices)
        rows.append((f"  {replica.node}", devices or "none", ", ".join(replica.preempts), replica.message))
    if rows:
        session.show(table(("  NODE", "DEVICES", "PRE-EMPTS", "WHY"), rows))
    elif not planned.pending_replicas:
        session.write("  nothing would be started")
    if planned.pending_replicas:
        session.write(f"  {planned.pending_replicas} would have to wait: {planned.message}")


def register(application: typer.Typer) -> None:
    """Adds the command."""
    application.command("plan")(plan)
