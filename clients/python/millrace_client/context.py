"""Where to talk to, and with which credential.

In come explicit options, the environment and `.millrace/local.json` of the current folder or a parent
(written by `make up`), looked at in that order, value by value; out comes one immutable `Context`. A
credential of the local file is only used for the addresses of the local file: it must never travel to
another server. Nothing here connects to anything.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from millrace_client.errors import ContextError

LOCAL_FILE = Path(".millrace") / "local.json"
# A token is a few dozen characters and the local file a few hundred; anything longer is the wrong file.
FILE_BYTES_MAX = 64 * 1024

SERVER_VARIABLE = "MILLRACE_SERVER"
TOKEN_VARIABLE = "MILLRACE_TOKEN"  # noqa: S105 - the name of a variable, not a secret
ROUTER_URL_VARIABLE = "MILLRACE_ROUTER_URL"
API_KEY_VARIABLE = "MILLRACE_API_KEY"
NAMESPACE_VARIABLE = "MILLRACE_NAMESPACE"
TLS_AUTHORITY_VARIABLE = "MILLRACE_TLS_AUTHORITY"
TLS_CERTIFICATE_VARIABLE = "MILLRACE_TLS_CERTIFICATE"
TLS_KEY_VARIABLE = "MILLRACE_TLS_KEY"


@dataclass(frozen=True, slots=True)
class Context:
    """What is known of a Millrace. Empty fields are unknown; the `require_...` methods say how to give them.

    Attributes:
        target: host:port of the control plane's gRPC.
        tls: Speak TLS with the control plane.
        token: Bearer token for it.
        router_url: Base URL of the router, without `/v1`.
        api_key: Key for the router.
        namespace: Default namespace.
        deployment: Default deployment for a chat.
        tls_authority: PEM file of the authority that signed the control plane's certificate.
        tls_certificate: PEM file of our own certificate.
        tls_key: PEM file of our own key.
        local_file: The local file that was read; None when there was none.
    """

    target: str = ""
    tls: bool = False
    token: str = field(default="", repr=False)
    router_url: str = ""
    api_key: str = field(default="", repr=False)
    namespace: str = ""
    deployment: str = ""
    tls_authority: Path | None = None
    tls_certificate: Path | None = None
    tls_key: Path | None = None
    local_file: Path | None = None

    def require_target(self) -> str:
        """Returns the control plane's address.

        Raises:
            ContextError: It is not known.
        """
        if not self.target:
            raise ContextError(
                f"no control plane to talk to: stand in a folder where `make up` runs, give --server "
                f"host:port, or set {SERVER_VARIABLE}"
            )
        return self.target

    def require_router_url(self) -> str:
        """Returns the router's URL.

        Raises:
            ContextError: It is not known.
        """
        if not self.router_url:
            raise ContextError(
                "no router to talk to: stand in a folder where `make up` runs, give --router-url "
                f"http://host:8080, or set {ROUTER_URL_VARIABLE}"
            )
        return self.router_url

    def require_api_key(self) -> str:
        """Returns the router key.

        Raises:
            ContextError: It is not known.
        """
        if not self.api_key:
            raise ContextError(
                f"no API key for {self.router_url or 'the router'}: give --api-key-file FILE or set "
                f"{API_KEY_VARIABLE} (the key was shown when the deployment was applied)"
            )
        return self.api_key

    def require_namespace(self) -> str:
        """Returns the default namespace.

        Raises:
            ContextError: It is not known.
        """
        if not self.namespace:
            raise ContextError(
                f"which namespace? Give -n NAMESPACE, write namespace/name, or set {NAMESPACE_VARIABLE}"
            )
        return self.namespace


def resolve_context(
    *,
    server: str = "",
    token_file: Path | None = None,
    router_url: str = "",
    api_key_file: Path | None = None,
    namespace: str = "",
    tls_authority: Path | None = None,
    environment: Mapping[str, str] | None = None,
    folder: Path | None = None,
) -> Context:
    """Finds out where to talk to.

    Args:
        server: host:port, or https://host:port for TLS with the system's authorities.
        token_file: File that holds the bearer token.
        router_url: Base URL of the router.
        api_key_file: File that holds the router key.
        namespace: Default namespace.
        tls_authority: PEM file of the authority that signed the control plane's certificate.
        environment: Environment variables; the process's own by default.
        folder: Where the search for the local file begins; the current folder by default.

    Raises:
        ContextError: A file cannot be read, or a value makes no sense.
    """
    variables = os.environ if environment is None else environment
    local_file = find_local_file(folder or Path.cwd())
    local = _read_local(local_file) if local_file is not None else {}
    local_target, local_router_url = _text(local, "grpc_target"), _url(_text(local, "router_url"))

    target, tls = _target(server or variables.get(SERVER_VARIABLE, "") or local_target)
    authority = tls_authority or _path(variables.get(TLS_AUTHORITY_VARIABLE))
    certificate = _path(variables.get(TLS_CERTIFICATE_VARIABLE))
    key = _path(variables.get(TLS_KEY_VARIABLE))
    router = _url(router_url or variables.get(ROUTER_URL_VARIABLE, "") or local_router_url)

    token = _secret_file(token_file, "--token-file") or variables.get(TOKEN_VARIABLE, "").strip()
    if not token and target == local_target:
        token = _text(local, "admin_token")
    api_key = _secret_file(api_key_file, "--api-key-file") or variables.get(API_KEY_VARIABLE, "").strip()
    if not api_key and router == local_router_url:
        api_key = _text(local, "api_key")
    return Context(
        target=target,
        tls=tls or authority is not None or certificate is not None,
        token=_one_line(token, "the token"),
        router_url=router,
        api_key=_one_line(api_key, "the API key"),
        namespace=namespace or variables.get(NAMESPACE_VARIABLE, "") or _text(local, "namespace"),
        deployment=_text(local, "deployment") if router == local_router_url else "",
        tls_authority=authority,
        tls_certificate=certificate,
        tls_key=key,
        local_file=local_file,
    )


def find_local_file(folder: Path) -> Path | None:
    """Returns `.millrace/local.json` of a folder or the nearest parent that has one."""
    for each in (folder, *folder.parents):
        candidate = each / LOCAL_FILE
        if candidate.is_file():
            return candidate
    return None


def _read_local(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(_read(path, "the local file"))
    except ValueError as error:
        raise ContextError(f"{path} is not JSON ({error}): run `make up` again, or delete it") from error
    if not isinstance(content, dict):
        raise ContextError(f"{path} is not a JSON object: run `make up` again, or delete it")
    return content


def _read(path: Path, what: str) -> str:
    try:
        with path.open("rb") as file:
            content = file.read(FILE_BYTES_MAX + 1)
        if len(content) > FILE_BYTES_MAX:
            raise ContextError(f"{what} {path} is larger than {FILE_BYTES_MAX} bytes: is it the right file?")
        return content.decode("utf-8")
    except OSError as error:
        raise ContextError(f"cannot read {what} {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ContextError(f"{what} {path} is not text: is it the right file?") from error


def _secret_file(path: Path | None, option: str) -> str:
    if path is None:
        return ""
    secret = _read(path, option).strip()
    if not secret:
        raise ContextError(f"{option} {path} is empty")
    return secret


def _one_line(secret: str, what: str) -> str:
    """Refuses what cannot stand in a header, without showing it."""
    if not all(" " < character <= "~" for character in secret):
        raise ContextError(
            f"{what} holds spaces or characters that no header can carry: is it the right file?"
        )
    return secret


def _text(local: Mapping[str, Any], name: str) -> str:
    value = local.get(name)
    return value.strip() if isinstance(value, str) else ""


def _path(value: str | None) -> Path | None:
    return Path(value) if value else None


def _url(value: str) -> str:
    if not value:
        return ""
    if not value.startswith(("http://", "https://")):
        raise ContextError(f"`{value}` is no router URL: write http://host:port")
    # Users copy the endpoint that they were told, which ends in /v1.
    return value.rstrip("/").removesuffix("/v1")


def _target(server: str) -> tuple[str, bool]:
    """Splits an address into host:port and whether to speak TLS."""
    if not server:
        return "", False
    tls = server.startswith("https://")
    target = server.removeprefix("https://").removeprefix("http://").rstrip("/")
    host, separator, port = target.rpartition(":")
    if not separator or not host or "/" in target or not port.isdigit() or not 0 < int(port) < 65536:
        raise ContextError(
            f"`{server}` is no control plane address: write host:port, for example 127.0.0.1:7600"
        )
    return target, tls
