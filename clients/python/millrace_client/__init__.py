"""Python SDK of Millrace: the names that users import, and nothing else.

In comes `from millrace_client import MillraceClient, errors`; out comes a client of the contract in
`protos/`. The names are loaded when they are first used, so that the command line (`millrace_client.cli`),
which lives in the same distribution, starts without loading gRPC. It must not import anything of the
server.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from millrace_client import errors
    from millrace_client.blocking import BlockingClient
    from millrace_client.client import MillraceClient
    from millrace_client.context import Context, resolve_context
    from millrace_client.following import ChangeKind, DeploymentChange

__all__ = [
    "BlockingClient",
    "ChangeKind",
    "Context",
    "DeploymentChange",
    "MillraceClient",
    "errors",
    "resolve_context",
]

_HOMES = {
    "BlockingClient": "millrace_client.blocking",
    "ChangeKind": "millrace_client.following",
    "Context": "millrace_client.context",
    "DeploymentChange": "millrace_client.following",
    "MillraceClient": "millrace_client.client",
    "resolve_context": "millrace_client.context",
}


def __getattr__(name: str) -> Any:
    if name == "errors":
        return import_module("millrace_client.errors")
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
