"""`millrace nodes`, `cordon`, `uncordon`, `drain`, `label`, `taint`: the machines.

In come node names, out come tables of what the machines have and hold, or what was changed. Nothing here
decides where replicas go: it tells the control plane what an operator wants of a node.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from millrace_client.cli.session import Session, command

if TYPE_CHECKING:
    from millrace.core.v1.node_pb2 import Node

    from millrace_client.client import MillraceClient

NodeName = Annotated[str, typer.Argument(help="Node.", metavar="NODE")]
COLUMNS = (
    "NAME",
    "STATE",
    "SCHEDULING",
    "TAINTS",
    "DEVICES",
    "MEMORY",
    "ENGINES",
    "REPLICAS",
    "HEARD",
    "VERSION",
)

group = typer.Typer(rich_markup_mode=None, invoke_without_command=True)


@group.callback()
@command
def nodes(session: Session) -> None:
    """List nodes, or operate one.

    Examples:
      millrace nodes
      millrace nodes get node-1 -o yaml
      millrace nodes drain node-1
    """
    show_nodes(session, None)


def show_nodes(session: Session, name: str | None) -> None:
    """Writes all nodes, or one."""
    from millrace_client.cli.render import message_data, table

    if name is not None:
        node = session.run(lambda client: client.node(name))
        if session.structured:
            session.emit(message_data(node))
        else:
            # What operators say of a machine counts more than what it says of itself.
            labels = _labels_text({**node.status.inventory.labels, **node.spec.labels})
            session.show(
                table(COLUMNS, [_row(node)]),
                "",
                f"Labels: {labels or 'none'}",
                "",
                _devices(node),
                "",
                _engines(node),
            )
        return
    found = session.run(lambda client: client.nodes())
    if session.structured:
        session.emit({"nodes": [message_data(each) for each in found]})
    elif not found:
        session.note("no nodes: start `millrace-nodeagent` on a machine")
    else:
        session.show(table(COLUMNS, [_row(each) for each in found]))


@group.command("get")
@command
def get_node(session: Session, name: NodeName) -> None:
    """Get one node with its devices and engines."""
    show_nodes(session, name)


@command
def cordon(session: Session, name: NodeName) -> None:
    """Stop placing replicas on a node; those on it stay.

    Example:
      millrace cordon node-1
    """
    _cordon(session, name, cordoned=True)


@command
def uncordon(session: Session, name: NodeName) -> None:
    """Allow replicas on a node again; takes cordon and drain back.

    Example:
      millrace uncordon node-1
    """
    _cordon(session, name, cordoned=False)


@command
def drain(session: Session, name: NodeName) -> None:
    """Cordon a node and move its replicas away.

    Example:
      millrace drain node-1
    """
    from millrace_client.cli.render import message_data

    response = session.run(lambda client: client.drain(name))
    if session.structured:
        session.emit(message_data(response))
        return
    session.write(f"node {name} is draining")
    for each in response.moving:
        session.write(f"  {each} moves")
    if not response.moving:
        session.write("  nothing runs on it")


@command
def label(
    session: Session,
    name: NodeName,
    changes: Annotated[
        list[str], typer.Argument(help="KEY=VALUE, or KEY- to take it away.", metavar="CHANGE...")
    ],
) -> None:
    """Set or take away labels of a node, for `placement.node_selector`.

    Examples:
      millrace label node-1 zone=north disk=nvme
      millrace label node-1 disk-
    """
    from millrace.core.v1.node_pb2 import NodeSpec

    from millrace_client.cli.placement import parse_labels

    wanted, gone = parse_labels(changes)

    async def change(client: "MillraceClient") -> "Node":
        node = await client.node(name)
        kept = {key: value for key, value in node.spec.labels.items() if key not in gone}
        spec = NodeSpec(labels={**kept, **wanted})
        return await client.update_node(name, spec, fields=("labels",), etag=node.etag)

    _changed(session, session.run(change))


@command
def taint(
    session: Session,
    name: NodeName,
    changes: Annotated[
        list[str], typer.Argument(help="KEY=VALUE:EFFECT, or KEY- to take it away.", metavar="CHANGE...")
    ],
) -> None:
    """Set or take away taints of a node; replicas that do not tolerate them stay off it.

    Examples:
      millrace taint node-1 dedicated=research:no_schedule
      millrace taint node-1 maintenance:no_execute
      millrace taint node-1 dedicated-
    """
    from millrace.core.v1.node_pb2 import NodeSpec

    from millrace_client.cli.placement import parse_taints

    wanted, gone = parse_taints(changes)
    replaced = {(each.key, each.effect) for each in wanted}

    async def change(client: "MillraceClient") -> "Node":
        node = await client.node(name)
        kept = [
            each
            for each in node.spec.taints
            if each.key not in gone and (each.key, each.effect) not in replaced
        ]
        spec = NodeSpec(taints=[*kept, *wanted])
        return await client.update_node(name, spec, fields=("taints",), etag=node.etag)

    _changed(session, session.run(change))


def _changed(session: Session, node: "Node") -> None:
    from millrace_client.cli.render import message_data

    if session.structured:
        session.emit(message_data(node))
        return
    labels = _labels_text(node.spec.labels)
    session.write(f"node {node.name} labels: {labels or 'none'}; taints: {_taints_text(node) or 'none'}")


def _labels_text(labels: Mapping[str, str]) -> str:
    return ",".join(f"{key}={value}" for key, value in sorted(labels.items()))


def _taints_text(node: "Node") -> str:
    """Returns the taints as `millrace taint` takes them."""
    from millrace_client.cli.render import enum_name

    return ",".join(
        f"{each.key}{'=' if each.value else ''}{each.value}:{enum_name(each, 'effect').lower()}"
        for each in node.spec.taints
    )


def register(application: typer.Typer) -> None:
    """Adds the commands, at the top and in the group `nodes`."""
    for function in (cordon, uncordon, drain, label, taint):
        group.command(function.__name__)(function)
        application.command(function.__name__)(function)
    application.add_typer(group, name="nodes")


def _cordon(session: Session, name: str, *, cordoned: bool) -> None:
    from millrace_client.cli.render import message_data

    node = session.run(lambda client: client.cordon(name, cordoned=cordoned))
    if session.structured:
        session.emit(message_data(node))
    else:
        session.write(f"node {name} is {'cordoned' if cordoned else 'open for replicas'}")


def scheduling_text(node: "Node") -> str:
    """Returns whether a node takes replicas, in one word."""
    if node.spec.draining:
        return "draining"
    return "cordoned" if node.spec.cordoned else "open"


def _row(node: "Node") -> Sequence[str]:
    from millrace_client.cli.render import UNKNOWN, age_text, bytes_text, enum_name, spelled

    inventory = node.status.inventory
    engines = [spelled(each, "engine") for each in inventory.engines if not each.unavailable_reason]
    kinds = [enum_name(each, "kind") for each in inventory.devices]
    devices = ", ".join(f"{kinds.count(kind)}x {kind}" for kind in dict.fromkeys(kinds))
    memory_bytes = sum(each.memory_bytes for each in inventory.devices)
    return (
        node.name,
        enum_name(node.status, "state"),
        scheduling_text(node),
        _taints_text(node) or UNKNOWN,
        devices,
        bytes_text(memory_bytes) if inventory.devices else "",
        ",".join(engines),
        str(len(node.status.replicas)),
        age_text(node.status.heartbeat_time),
        inventory.version,
    )


def _devices(node: "Node") -> object:
    from millrace_client.cli.render import bytes_text, enum_name, table

    rows = [
        (each.id, enum_name(each, "kind"), bytes_text(each.memory_bytes), each.product)
        for each in node.status.inventory.devices
    ]
    return table(("DEVICE", "KIND", "MEMORY", "PRODUCT"), rows)


def _engines(node: "Node") -> object:
    from millrace_client.cli.render import spelled, table

    rows = [
        (spelled(each, "engine"), each.version, each.unavailable_reason or "can be started")
        for each in node.status.inventory.engines
    ]
    return table(("ENGINE", "VERSION", "STATE"), rows)
