"""`millrace get`: lists of deployments, nodes and events, and single ones of them.

In comes a kind and perhaps a name, out comes a table for a person or the contract's own data for a
program. It only reads.
"""

from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from millrace_client import errors
from millrace_client.cli.session import Session, command

if TYPE_CHECKING:
    from millrace.core.v1.deployment_pb2 import Deployment


class Kind(StrEnum):
    """What can be listed."""

    DEPLOYMENTS = "deployments"
    DEPLOYMENT = "deployment"
    NODES = "nodes"
    NODE = "node"
    EVENTS = "events"


AllNamespaces = Annotated[bool, typer.Option("-A", "--all-namespaces", help="Of every namespace.")]


@command
def get(
    session: Session,
    kind: Annotated[Kind, typer.Argument(help="What to list.")] = Kind.DEPLOYMENTS,
    name: Annotated[
        str | None, typer.Argument(help="Only this one; a deployment may be written namespace/name.")
    ] = None,
    *,
    all_namespaces: AllNamespaces = False,
) -> None:
    """List deployments, nodes or events, or get one of them.

    Examples:
      millrace get
      millrace get deployment team-ai/qwen -o json
      millrace get nodes
      millrace get events qwen
    """
    from millrace_client.cli import nodes, streams

    if all_namespaces and session.options.namespace:
        raise errors.InvalidArgument("-A and -n contradict each other: give one of them")
    if kind in {Kind.NODES, Kind.NODE}:
        if kind is Kind.NODE and name is None:
            raise typer.BadParameter("which node? Write `millrace get node NAME`")
        nodes.show_nodes(session, name)
    elif kind is Kind.EVENTS:
        streams.show_events(session, name, follow=False, all_namespaces=all_namespaces)
    elif name is not None:
        _show_deployment(session, name)
    elif kind is Kind.DEPLOYMENT:
        raise typer.BadParameter("which deployment? Write `millrace get deployment NAME`")
    else:
        _show_deployments(session, all_namespaces=all_namespaces)


def _show_deployments(session: Session, *, all_namespaces: bool) -> None:
    from millrace_client.cli.render import message_data, table

    namespace = "" if all_namespaces else session.context.namespace
    found = session.run(lambda client: client.list(namespace))
    if session.structured:
        session.emit({"deployments": [message_data(each) for each in found]})
    elif not found:
        session.note(f"no deployments in {namespace or 'any namespace'} (`millrace apply -f FILE` makes one)")
    elif namespace:
        session.show(table(COLUMNS, [deployment_row(each) for each in found]))
    else:
        rows = [(each.namespace, *deployment_row(each)) for each in found]
        session.show(table(("NAMESPACE", *COLUMNS), rows))


def _show_deployment(session: Session, name: str) -> None:
    from millrace_client.cli.render import message_data, table

    key = session.split_name(name)
    found = session.run(lambda client: client.get(*key))
    if session.structured:
        session.emit(message_data(found))
    else:
        session.show(table(COLUMNS, [deployment_row(found)]))


COLUMNS = ("NAME", "MODEL", "ENGINE", "READY", "PHASE", "AGE")


def phase_text(deployment: "Deployment") -> str:
    """Returns the phase, with what it alone would hide: a roll back, and sleep that a request ends."""
    from millrace_client.cli.render import enum_name

    status = deployment.status
    phase = enum_name(status, "phase")
    if any(each.type == "Progressing" and each.reason == "RolledBack" for each in status.conditions):
        return f"{phase}, rolled back"
    sleeps = deployment.spec.HasField("autoscale") and deployment.spec.autoscale.max_replicas > 0
    return f"{phase}, asleep" if sleeps and phase == "STOPPED" else phase


def deployment_row(deployment: "Deployment") -> tuple[str, ...]:
    """Returns a deployment as a row of the table."""
    from millrace_client.cli.render import age_text, spelled

    status = deployment.status
    return (
        deployment.name,
        deployment.spec.model,
        spelled(deployment.spec, "engine"),
        f"{status.ready_replicas}/{status.desired_replicas}",
        phase_text(deployment),
        age_text(deployment.create_time),
    )
