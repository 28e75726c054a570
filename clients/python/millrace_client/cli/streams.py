"""`millrace logs` and `millrace events`: what engines write, and what happened.

In comes what to look at, out come lines as they arrive: text for a person, one JSON object a line for a
program. Following ends with Ctrl-C, or when the reader of the pipe goes away.
"""

from contextlib import aclosing
from typing import TYPE_CHECKING, Annotated

import typer

from millrace_client import errors
from millrace_client.cli.get import AllNamespaces
from millrace_client.cli.session import Session, command

if TYPE_CHECKING:
    from millrace.core.v1.event_pb2 import Event

    from millrace_client.client import MillraceClient

TAIL_LINES = 100
TAIL_LINES_MAX = 10_000
COLUMNS = ("TIME", "SEVERITY", "REASON", "ABOUT", "MESSAGE")


@command
def logs(
    session: Session,
    name: Annotated[str, typer.Argument(help="Deployment; may be written namespace/name.")],
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Go on with new lines.")] = False,
    replica: Annotated[
        str, typer.Option(help="Only this replica; the part behind the last - is enough.", metavar="REPLICA")
    ] = "",
    tail: Annotated[
        int, typer.Option(help="Lines from the end to begin with, a replica.", min=1, max=TAIL_LINES_MAX)
    ] = TAIL_LINES,
) -> None:
    """Show the log of a deployment's engines.

    Examples:
      millrace logs qwen -f
      millrace logs team-ai/qwen --tail 1000 | grep -i error
      millrace logs qwen --replica qwen-k3b7x2m4qa -o json
    """
    from millrace_client.cli.render import message_data, printable

    key = session.split_name(name)

    async def work(client: "MillraceClient") -> None:
        chosen = await _full_replica(client, key, replica)
        stream = client.logs(*key, replica=chosen, tail_lines=tail, follow=follow)
        empty = True
        async with aclosing(stream) as lines:
            async for line in lines:
                empty = False
                if session.structured:
                    session.emit_line(message_data(line))
                else:
                    prefix = "" if chosen else f"{line.replica.rpartition('-')[2]} | "
                    session.write(prefix + printable(line.line))
        if empty and not session.structured:
            session.note("no replica has written anything yet (`millrace describe` tells where it stands)")

    session.run(work)


async def _full_replica(client: "MillraceClient", key: tuple[str, str], replica: str) -> str:
    """Completes the short form of a replica's id."""
    if not replica or replica.startswith(f"{key[1]}-"):
        return replica
    deployment = await client.get(*key)
    found = [each.replica for each in deployment.status.replicas if each.replica.endswith(replica)]
    if len(found) != 1:
        known = ", ".join(each.replica for each in deployment.status.replicas) or "none"
        raise errors.NotFound(
            f"no single replica of {'/'.join(key)} ends in `{replica}` (there are: {known})"
        )
    return found[0]


@command
def events(
    session: Session,
    name: Annotated[str | None, typer.Argument(help="Deployment; may be written namespace/name.")] = None,
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Go on with new events.")] = False,
    *,
    all_namespaces: AllNamespaces = False,
) -> None:
    """Show what happened, and why.

    Examples:
      millrace events
      millrace events qwen -f
      millrace events -A -o json | jq 'select(.severity == "EVENT_SEVERITY_WARNING")'
    """
    show_events(session, name, follow=follow, all_namespaces=all_namespaces)


def show_events(session: Session, name: str | None, *, follow: bool, all_namespaces: bool) -> None:
    """Writes the kept events and, with `follow`, new ones as they come."""
    if name is not None:
        namespace, deployment = session.split_name(name)
    else:
        namespace, deployment = ("" if all_namespaces else session.context.namespace), ""

    from millrace_client.cli.render import table

    async def work(client: "MillraceClient") -> None:
        kept: list[Event] = []
        async with aclosing(client.events(namespace, deployment, follow=follow)) as stream:
            async for event in stream:
                if follow or session.structured:
                    _write(session, event)
                else:
                    kept.append(event)
        if kept:
            session.show(table(COLUMNS, [event_row(each) for each in kept]))
        elif not follow and not session.structured:
            where = "/".join(each for each in (namespace, deployment) if each)
            session.note(f"no events of {where or 'any namespace'} in the last 24 hours")

    session.run(work)


def _write(session: Session, event: "Event") -> None:
    from millrace_client.cli.render import message_data, printable

    if session.structured:
        session.emit_line(message_data(event))
    else:
        session.write(printable("  ".join(event_row(event))))


def event_row(event: "Event") -> tuple[str, ...]:
    """Returns an event as a row of the table."""
    from millrace_client.cli.render import enum_name, time_text

    about = event.replica or event.deployment or event.node
    return (time_text(event.time), enum_name(event, "severity"), event.reason, about, event.message)
