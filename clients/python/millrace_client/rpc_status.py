"""From gRPC's errors to ours: the one place where either is known.

In comes what a call raised, with its rich `google.rpc.Status`; out comes an error of `errors` with the
reason, the metadata and the wrong fields. It must not lose the cause (callers chain it) and must not
let an unbounded text through to a terminal or a log.
"""

from typing import cast

import grpc
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from millrace_client import errors

# Longer texts are cut: they come from outside and end in terminals and logs.
MESSAGE_LENGTH_MAX = 2048

_KINDS: dict[grpc.StatusCode, type[errors.MillraceError]] = {
    grpc.StatusCode.UNAUTHENTICATED: errors.Unauthenticated,
    grpc.StatusCode.PERMISSION_DENIED: errors.PermissionDenied,
    grpc.StatusCode.NOT_FOUND: errors.NotFound,
    grpc.StatusCode.ALREADY_EXISTS: errors.AlreadyExists,
    grpc.StatusCode.ABORTED: errors.Conflict,
    grpc.StatusCode.FAILED_PRECONDITION: errors.FailedPrecondition,
    grpc.StatusCode.OUT_OF_RANGE: errors.OutOfRange,
    grpc.StatusCode.RESOURCE_EXHAUSTED: errors.ResourceExhausted,
    grpc.StatusCode.UNAVAILABLE: errors.Unavailable,
    grpc.StatusCode.DEADLINE_EXCEEDED: errors.DeadlineExceeded,
}


def from_rpc_error(error: grpc.aio.AioRpcError, *, target: str) -> errors.MillraceError:
    """Converts what a call raised.

    Args:
        error: As gRPC raised it.
        target: host:port of the control plane, for the message of a connection that failed.
    """
    reason, metadata, violations = _details(error)
    message = (error.details() or error.code().name)[:MESSAGE_LENGTH_MAX]
    code = error.code()
    if code is grpc.StatusCode.INVALID_ARGUMENT:
        if violations:
            message = "; ".join(f"{each.field}: {each.description}" for each in violations)
        return errors.InvalidArgument(
            message[:MESSAGE_LENGTH_MAX], reason=reason, metadata=metadata, violations=violations
        )
    if code is grpc.StatusCode.UNAVAILABLE and not reason:
        # Without a reason of ours it is the transport that speaks, in words that help nobody.
        message = f"cannot reach the control plane at {target}: {_transport_cause(message)}"
    elif code is grpc.StatusCode.DEADLINE_EXCEEDED and not reason:
        message = f"no answer from the control plane at {target} in time"
    elif code is grpc.StatusCode.UNIMPLEMENTED:
        message = f"the server at {target} does not know this call: {message}"
    return _KINDS.get(code, errors.ServerFault)(message, reason=reason, metadata=metadata)


def _details(
    error: grpc.aio.AioRpcError,
) -> tuple[str, dict[str, str], tuple[errors.FieldViolation, ...]]:
    reason, metadata = "", dict[str, str]()
    violations: tuple[errors.FieldViolation, ...] = ()
    try:
        # The stubs know only the blocking API's Call; AioRpcError has the three methods that are read.
        status = rpc_status.from_call(cast(grpc.Call, error))
    except ValueError:
        # The status in the trailers contradicts the call's own: neither reason nor fields are known.
        return reason, metadata, violations
    for detail in status.details if status is not None else ():
        if detail.Is(error_details_pb2.ErrorInfo.DESCRIPTOR):
            info = error_details_pb2.ErrorInfo()
            detail.Unpack(info)
            reason, metadata = info.reason, dict(info.metadata)
        elif detail.Is(error_details_pb2.BadRequest.DESCRIPTOR):
            request = error_details_pb2.BadRequest()
            detail.Unpack(request)
            violations = tuple(
                errors.FieldViolation(each.field, each.description) for each in request.field_violations
            )
    return reason, metadata, violations


def _transport_cause(message: str) -> str:
    """Picks the part of gRPC's text that a person can act on."""
    lowered = message.lower()
    for needle, cause in (
        ("connection refused", "connection refused"),
        ("dns resolution failed", "the host name does not resolve"),
        ("domain name not found", "the host name does not resolve"),
        ("certificate", "the TLS certificate was not accepted"),
        ("handshake", "the TLS handshake failed (does the server speak TLS?)"),
        ("socket closed", "the connection was closed"),
    ):
        if needle in lowered:
            return cause
    return message.splitlines()[0][:200]
