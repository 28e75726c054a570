"""`millrace namespace`: tenants, their model aliases and their quotas.

In come names and numbers, out come tables of what was said of namespaces, or what was changed. A change reads
the namespace, changes one thing and writes it back under its version, so that nobody's change is lost.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from millrace_client import errors
from millrace_client.cli.session import Session, command

if TYPE_CHECKING:
    from millrace.core.v1.policy_pb2 import Namespace, NamespaceSpec

    from millrace_client.client import MillraceClient

NamespaceName = Annotated[str, typer.Argument(help="Namespace.", metavar="NAMESPACE")]
AliasName = Annotated[str, typer.Argument(help="Model name that clients send.", metavar="ALIAS")]
Targets = Annotated[
    list[str],
    typer.Argument(help="Deployment, with its share of the requests.", metavar="DEPLOYMENT[=WEIGHT]..."),
]
COLUMNS = ("NAME", "DEVICES", "REPLICAS", "ALIASES")

group = typer.Typer(
    rich_markup_mode=None,
    invoke_without_command=True,
    help="Tenants: model aliases and quotas.",
)


@group.callback()
@command
def namespaces(session: Session) -> None:
    """List namespaces of which something was said, or change one.

    Examples:
      millrace namespace
      millrace namespace alias team-ai chat qwen-new=20 qwen=80
      millrace namespace quota team-ai --devices 8
    """
    from millrace_client.cli.render import message_data, table

    found = session.run(lambda client: client.namespaces())
    if session.structured:
        session.emit({"namespaces": [message_data(each) for each in found]})
    elif not found:
        session.note("no namespace has a quota or an alias")
    else:
        session.show(table(COLUMNS, [_row(each) for each in found]))


@group.command("get")
@command
def get_namespace(session: Session, name: NamespaceName) -> None:
    """Get one namespace with its aliases."""
    _show(session, session.run(lambda client: client.namespace(name)))


@group.command("alias")
@command
def alias(session: Session, name: NamespaceName, model: AliasName, targets: Targets) -> None:
    """Lead a model name to deployments; several share the requests by weight.

    Examples:
      millrace namespace alias team-ai gpt-4o-mini qwen
      millrace namespace alias team-ai chat qwen-new=20 qwen=80
    """
    shares = [_target(each) for each in targets]

    def change(spec: "NamespaceSpec") -> None:
        entry = next((each for each in spec.aliases if each.name == model), None)
        entry = spec.aliases.add(name=model) if entry is None else entry
        del entry.targets[:]
        for deployment, weight in shares:
            entry.targets.add(deployment=deployment, weight=weight)

    _change(session, name, "aliases", change, f"{name}: {model} leads to {', '.join(targets)}")


@group.command("unalias")
@command
def unalias(session: Session, name: NamespaceName, model: AliasName) -> None:
    """Take a model name back.

    Example:
      millrace namespace unalias team-ai chat
    """

    def change(spec: "NamespaceSpec") -> None:
        kept = [each for each in spec.aliases if each.name != model]
        if len(kept) == len(spec.aliases):
            raise errors.NotFound(f"namespace {name} has no alias {model}")
        del spec.aliases[:]
        spec.aliases.extend(kept)

    _change(session, name, "aliases", change, f"{name}: {model} leads nowhere")


@group.command("quota")
@command
def quota(
    session: Session,
    name: NamespaceName,
    devices: Annotated[int | None, typer.Option(min=0, help="Devices held by placed replicas.")] = None,
    replicas: Annotated[int | None, typer.Option(min=0, help="Replicas placed.")] = None,
) -> None:
    """Bound what a namespace may hold; what is left out is unbounded.

    Examples:
      millrace namespace quota team-ai --devices 8 --replicas 20
      millrace namespace quota team-ai
    """

    def change(spec: "NamespaceSpec") -> None:
        spec.ClearField("quota")
        if devices is not None:
            spec.quota.devices = devices
        if replicas is not None:
            spec.quota.replicas = replicas

    bounds = [
        f"{value} {noun}"
        for value, noun in ((devices, "devices"), (replicas, "replicas"))
        if value is not None
    ]
    _change(session, name, "quota", change, f"{name} may hold {' and '.join(bounds) or 'anything'}")


def register(application: typer.Typer) -> None:
    """Adds the commands."""
    application.add_typer(group, name="namespace")


def _change(
    session: Session, name: str, field: str, change: "Callable[[NamespaceSpec], None]", done: str
) -> None:
    from millrace_client.cli.render import message_data

    async def work(client: "MillraceClient") -> "Namespace":
        namespace = await client.namespace(name)
        change(namespace.spec)
        return await client.update_namespace(name, namespace.spec, fields=[field], etag=namespace.etag)

    namespace = session.run(work)
    if session.structured:
        session.emit(message_data(namespace))
    else:
        session.write(done)


def _target(text: str) -> tuple[str, int]:
    deployment, _, weight = text.partition("=")
    if not deployment or (weight and not (weight.isdecimal() and 0 < int(weight) < 2**31)):
        raise errors.InvalidArgument(
            f"`{text[:80]}` is no DEPLOYMENT[=WEIGHT]: a weight is a whole number of at least 1"
        )
    return deployment, int(weight or 1)


def _show(session: Session, namespace: "Namespace") -> None:
    from millrace_client.cli.render import message_data, table

    if session.structured:
        session.emit(message_data(namespace))
        return
    session.show(table(COLUMNS, [_row(namespace)]))
    rows = [
        (each.name, target.deployment, str(max(1, target.weight)))
        for each in namespace.spec.aliases
        for target in each.targets
    ]
    if rows:
        session.show("", table(("ALIAS", "DEPLOYMENT", "WEIGHT"), rows))


def _row(namespace: "Namespace") -> Sequence[str]:
    bounds = namespace.spec.quota
    return (
        namespace.name,
        str(bounds.devices) if bounds.HasField("devices") else "",
        str(bounds.replicas) if bounds.HasField("replicas") else "",
        ",".join(each.name for each in namespace.spec.aliases),
    )
