"""`millrace version`: which client this is, and what it reaches.

In comes the context, out come versions. An unreachable server is no error here: the client's own version
is what the command is for.
"""

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from millrace_client import errors
from millrace_client.cli.session import Session, command

if TYPE_CHECKING:
    from millrace_client.client import MillraceClient

# Someone who asks for a version does not wait for a server.
TIMEOUT_SECONDS = 2.0


def client_version() -> str:
    """Returns the version of this distribution."""
    try:
        return version("millrace-client")
    except PackageNotFoundError:
        return "unknown (not installed as a distribution)"


@command
def show_version(session: Session) -> None:
    """Show the versions of the client and, where it can be reached, of the cluster.

    Example:
      millrace version -o json
    """
    import asyncio

    async def work(client: "MillraceClient") -> dict[str, Any]:
        async with asyncio.timeout(session.options.timeout or TIMEOUT_SECONDS):
            nodes = await client.nodes()
        return {each.name: each.status.inventory.version for each in nodes}

    server: dict[str, Any] = {"target": "", "reachable": False, "nodes": {}, "error": ""}
    try:
        server["target"] = session.context.require_target()
        server["nodes"] = session.run(work)
        server["reachable"] = True
    except TimeoutError:
        server["error"] = "no answer"
    except errors.MillraceError as error:
        server["error"] = error.message
    if session.structured:
        session.emit({"client": client_version(), "server": server})
        return
    session.write(f"client  {client_version()}")
    if not server["reachable"]:
        session.write(f"server  not reached: {server['error']}")
        return
    session.write(f"server  {server['target']} answers")
    for name, agent in server["nodes"].items():
        session.write(f"node    {name}: agent {agent or 'of unknown version'}")
