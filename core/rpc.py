"""gRPC plumbing that every process shares: a server that denies by default, a channel that reconnects.

In come servicers, an authenticator and an access policy; out comes a server with health and reflection
on, where every method that the policy does not name is refused and every error leaves as a rich status.
It knows no service by name.
"""

# grpc's classes are generic for type checkers only and cannot be subscripted when they run.
from __future__ import annotations

import ipaddress
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import structlog
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from grpc_status import rpc_status

from core import errors
from core.identity import Principal, Role, TokenAuthenticator, allows, bearer_token
from core.rpc_errors import to_status
from core.telemetry import request_id_of, trace_id_of

_log = structlog.get_logger(__name__)

# Requests larger than this are refused: the largest honest one (an agent's full report) is far below.
MESSAGE_BYTES_MAX = 8 * 1024 * 1024
# A dead peer is noticed within KEEPALIVE_MS + KEEPALIVE_TIMEOUT_MS even when nothing is sent.
KEEPALIVE_MS = 5_000
KEEPALIVE_TIMEOUT_MS = 5_000

# Reads are asked for every second by dashboards and scripts: their lines would hide those of changes.
_QUIET_VERBS = ("Get", "List", "Watch", "Stream", "Explain")

OPEN_SERVICES = ("grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection")

principal_var: ContextVar[Principal | None] = ContextVar("principal", default=None)
"""Who makes the call that is being handled."""

_SERVER_OPTIONS = [
    ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
    ("grpc.max_send_message_length", MESSAGE_BYTES_MAX),
    # Two processes on one port would share its calls silently.
    ("grpc.so_reuseport", 0),
    ("grpc.keepalive_time_ms", KEEPALIVE_MS),
    ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_MS),
    ("grpc.http2.min_ping_interval_without_data_ms", 1_000),
    ("grpc.http2.max_pings_without_data", 0),
]
_CHANNEL_OPTIONS = [
    ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
    ("grpc.max_send_message_length", MESSAGE_BYTES_MAX),
    ("grpc.keepalive_time_ms", KEEPALIVE_MS),
    ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_MS),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    # Also the least time that an attempt to connect gets: a server that a thousand agents come back to at
    # once, or a machine that is busy, needs more than a moment for its first word.
    ("grpc.min_reconnect_backoff_ms", 2_000),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    # A proxy of the environment must never see cluster traffic.
    ("grpc.enable_http_proxy", 0),
]


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """Paths of PEM files. A server needs certificate and key; a CA makes it ask for client certificates."""

    certificate: Path | None = None
    key: Path | None = None
    authority: Path | None = None


def is_loopback(host: str) -> bool:
    """Tells whether a host is this machine only."""
    if host == "localhost" or host.startswith("unix:"):
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def split_target(target: str) -> tuple[str, int]:
    """Splits `host:port`.

    Raises:
        InvalidArgument: It is not of that form.
    """
    host, separator, port = target.rpartition(":")
    if not separator or not host or not port.isdigit() or int(port) > 65535:
        raise errors.InvalidArgument.of("target", f"`{target}` is not of the form host:port")
    return host, int(port)


def require_safe_bind(host: str, tls: TlsFiles, *, allow_plaintext: bool, option: str) -> None:
    """Refuses to listen beyond this machine without TLS.

    Raises:
        InvalidArgument: `host` is not loopback, there is no certificate, and plain text was not allowed.
    """
    if is_loopback(host) or tls.certificate is not None or allow_plaintext:
        return
    raise errors.InvalidArgument.of(
        option,
        f"listening on {host} leaves this machine and needs TLS: give a certificate and a key, listen "
        "on 127.0.0.1, or allow plain text on purpose",
    )


class _AccessInterceptor(grpc.aio.ServerInterceptor):
    """Authenticates, authorises and maps errors: the same three steps around every handler."""

    def __init__(self, authenticator: TokenAuthenticator, policy: Mapping[str, Role]) -> None:
        self._authenticator = authenticator
        self._policy = policy

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        handler = await continuation(handler_call_details)
        method = str(handler_call_details.method)
        if handler is None or method.split("/")[1] in OPEN_SERVICES:
            return handler
        metadata = dict(handler_call_details.invocation_metadata or ())
        header = metadata.get("authorization")
        try:
            principal = self._authorise(method, str(header) if header is not None else None)
        except errors.MillraceError as error:
            return _refusing(handler, error)
        return _guarded(handler, method, principal)

    def _authorise(self, method: str, header: str | None) -> Principal:
        token = bearer_token(header)
        if token is None:
            raise errors.Unauthenticated(
                "no credential: send `authorization: Bearer <token>`",
                reason="ERROR_REASON_CREDENTIAL_MISSING",
            )
        principal = self._authenticator.authenticate(token)
        if principal is None:
            raise errors.Unauthenticated(
                "the credential is not known: the control plane takes its admin token; "
                "API keys, which begin with sk-, are for the router"
            )
        required = self._policy.get(method)
        if required is None or not allows(principal.role, required):
            needed = required.name.lower() if required is not None else "none may call it"
            raise errors.PermissionDenied(
                f"role {principal.role.name.lower()} may not call {method} (needs: {needed})",
                metadata={
                    "role": principal.role.name.lower(),
                    "required_role": needed,
                    "method": method,
                },
            )
        return principal


async def _abort(context: Any, method: str, error: Exception) -> None:
    if isinstance(error, errors.MillraceError):
        await context.abort_with_status(rpc_status.to_status(to_status(error)))
    _log.error("handler failed", method=method, exc_info=error)
    await context.abort(grpc.StatusCode.INTERNAL, "internal error; the control plane's log has the details")


@contextmanager
def _recorded(method: str, principal: Principal, context: Any) -> Iterator[None]:
    """Ties what a handler logs to the caller's request id, and writes one line about a change."""
    metadata = {key: value for key, value in context.invocation_metadata() or () if isinstance(value, str)}
    # gRPC handles every call in a task of its own, so nothing has to be unbound.
    structlog.contextvars.bind_contextvars(
        request_id=request_id_of(metadata), trace_id=trace_id_of(metadata) or secrets.token_hex(16)
    )
    principal_var.set(principal)
    started = time.monotonic()
    try:
        yield
    finally:
        quiet = principal.role is Role.AGENT or method.rpartition("/")[2].startswith(_QUIET_VERBS)
        # gRPC notes a code only for a call that was refused.
        code = context.code()
        (_log.debug if quiet else _log.info)(
            "call",
            method=method,
            principal=principal.name,
            code=code.name if isinstance(code, grpc.StatusCode) else grpc.StatusCode.OK.name,
            duration_ms=round((time.monotonic() - started) * 1000, 1),
        )


def _guarded(
    handler: grpc.RpcMethodHandler[Any, Any], method: str, principal: Principal
) -> grpc.RpcMethodHandler[Any, Any]:
    async def unary(request: Any, context: Any) -> Any:
        with _recorded(method, principal, context):
            try:
                assert handler.unary_unary is not None
                return await handler.unary_unary(request, context)
            except (grpc.aio.AbortError, grpc.RpcError):
                raise
            except Exception as error:  # noqa: BLE001 - every escape becomes a status; the cause is logged
                return await _abort(context, method, error)

    async def stream(request: Any, context: Any) -> AsyncIterator[Any]:
        with _recorded(method, principal, context):
            try:
                assert handler.unary_stream is not None
                messages: Any = handler.unary_stream(request, context)
                async for message in messages:
                    yield message
            except (grpc.aio.AbortError, grpc.RpcError):
                raise
            except Exception as error:  # noqa: BLE001 - as above
                await _abort(context, method, error)

    if handler.response_streaming:
        return grpc.unary_stream_rpc_method_handler(
            stream,
            request_deserializer=handler.request_deserializer,
            response_serializer=handler.response_serializer,
        )
    return grpc.unary_unary_rpc_method_handler(
        unary,
        request_deserializer=handler.request_deserializer,
        response_serializer=handler.response_serializer,
    )


def _refusing(
    handler: grpc.RpcMethodHandler[Any, Any], error: errors.MillraceError
) -> grpc.RpcMethodHandler[Any, Any]:
    async def unary(_request: Any, context: Any) -> None:
        await context.abort_with_status(rpc_status.to_status(to_status(error)))

    async def stream(_request: Any, context: Any) -> AsyncIterator[Any]:
        await context.abort_with_status(rpc_status.to_status(to_status(error)))
        yield None

    build: Callable[..., grpc.RpcMethodHandler[Any, Any]] = (
        grpc.unary_stream_rpc_method_handler
        if handler.response_streaming
        else grpc.unary_unary_rpc_method_handler
    )
    return build(
        stream if handler.response_streaming else unary,
        request_deserializer=handler.request_deserializer,
        response_serializer=handler.response_serializer,
    )


@dataclass(slots=True)
class RpcServer:
    """A started gRPC server.

    Attributes:
        server: The grpc.aio server.
        port: Port that it listens on (the chosen one where 0 was asked for).
        health: Health servicer; `set` the overall status on it.
    """

    server: grpc.aio.Server
    port: int
    health: health.aio.HealthServicer

    async def set_serving(self, *, serving: bool) -> None:
        """Sets the overall health status."""
        status = health_pb2.HealthCheckResponse
        await self.health.set("", status.SERVING if serving else status.NOT_SERVING)

    async def stop(self, grace_seconds: float = 1.0) -> None:
        """Stops accepting, lets calls end for the grace period, then cancels them."""
        await self.health.enter_graceful_shutdown()
        await self.server.stop(grace_seconds)


async def start_server(
    *,
    host: str,
    port: int,
    register: Callable[[grpc.aio.Server], None],
    service_names: Sequence[str],
    authenticator: TokenAuthenticator,
    policy: Mapping[str, Role],
    tls: TlsFiles | None = None,
) -> RpcServer:
    """Starts a server with health and reflection on.

    Args:
        host: Address to listen on.
        port: Port; 0 chooses one.
        register: Adds the servicers.
        service_names: Full names, for reflection.
        authenticator: Knows the tokens.
        policy: Full method path (`/package.Service/Method`) to the role it needs; all else is refused.
        tls: Certificate and key; None listens in plain text.

    Raises:
        Unavailable: The port is taken.
    """
    server = grpc.aio.server(
        interceptors=[_AccessInterceptor(authenticator, policy)], options=_SERVER_OPTIONS
    )
    register(server)
    servicer = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    reflection.enable_server_reflection((*service_names, *OPEN_SERVICES), server)
    address = f"{host}:{port}"
    try:
        if tls is not None and tls.certificate is not None and tls.key is not None:
            credentials = grpc.ssl_server_credentials(
                [(tls.key.read_bytes(), tls.certificate.read_bytes())],
                root_certificates=tls.authority.read_bytes() if tls.authority else None,
                require_client_auth=tls.authority is not None,
            )
            bound = server.add_secure_port(address, credentials)
        else:
            bound = server.add_insecure_port(address)
    except RuntimeError as error:
        raise errors.Unavailable(f"cannot listen on {address}: is the port taken?") from error
    await server.start()
    started = RpcServer(server, bound, servicer)
    await started.set_serving(serving=True)
    return started


def open_channel(target: str, *, tls: TlsFiles | None = None) -> grpc.aio.Channel:
    """Opens a channel that reconnects by itself; TLS where an authority or certificate is given."""
    if tls is None or (tls.authority is None and tls.certificate is None):
        return grpc.aio.insecure_channel(target, options=_CHANNEL_OPTIONS)
    credentials = grpc.ssl_channel_credentials(
        root_certificates=tls.authority.read_bytes() if tls.authority else None,
        private_key=tls.key.read_bytes() if tls.key else None,
        certificate_chain=tls.certificate.read_bytes() if tls.certificate else None,
    )
    return grpc.aio.secure_channel(target, credentials, options=_CHANNEL_OPTIONS)


def call_metadata(token: str) -> tuple[tuple[str, str], ...]:
    """Metadata that authenticates a call."""
    return (("authorization", f"Bearer {token}"),)
