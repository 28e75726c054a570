"""Between our errors and gRPC's: the one place where either becomes the other.

In comes a `MillraceError`, out comes a `google.rpc.Status` with ErrorInfo (and BadRequest where fields
are wrong); and back again on the client's side. Anything else that escapes a handler becomes INTERNAL
without its text, which may hold what the caller must not see; the text goes to the log.
"""

from typing import Any, NoReturn

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.message import DecodeError
from google.rpc import code_pb2, error_details_pb2, status_pb2

from core import errors

ERROR_DOMAIN = "millrace"
_DETAILS_TRAILER = "grpc-status-details-bin"
# Error texts beyond this are cut: they travel in HTTP/2 trailers, which peers limit to 8 KiB.
MESSAGE_LENGTH_MAX = 2048

_CODES: tuple[tuple[type[errors.MillraceError], int], ...] = (
    (errors.InvalidArgument, code_pb2.INVALID_ARGUMENT),
    (errors.Unauthenticated, code_pb2.UNAUTHENTICATED),
    (errors.PermissionDenied, code_pb2.PERMISSION_DENIED),
    (errors.NotFound, code_pb2.NOT_FOUND),
    (errors.AlreadyExists, code_pb2.ALREADY_EXISTS),
    (errors.Conflict, code_pb2.ABORTED),
    (errors.FailedPrecondition, code_pb2.FAILED_PRECONDITION),
    (errors.OutOfRange, code_pb2.OUT_OF_RANGE),
    (errors.ResourceExhausted, code_pb2.RESOURCE_EXHAUSTED),
    (errors.Unavailable, code_pb2.UNAVAILABLE),
)


def to_status(error: errors.MillraceError) -> status_pb2.Status:
    """Converts an error to a rich gRPC status."""
    code = next((code for kind, code in _CODES if isinstance(error, kind)), code_pb2.INTERNAL)
    info = error_details_pb2.ErrorInfo(reason=error.reason, domain=ERROR_DOMAIN, metadata=error.metadata)
    details = [AnyMessage()]
    details[0].Pack(info)
    if isinstance(error, errors.InvalidArgument):
        request = error_details_pb2.BadRequest(
            field_violations=[
                error_details_pb2.BadRequest.FieldViolation(field=each.field, description=each.description)
                for each in error.violations
            ]
        )
        packed = AnyMessage()
        packed.Pack(request)
        details.append(packed)
    return status_pb2.Status(code=code, message=error.message[:MESSAGE_LENGTH_MAX], details=details)


def _details_of(error: Any) -> status_pb2.Status:
    """Reads the rich status that travels in the trailers; empty where there is none or it is broken."""
    for key, value in error.trailing_metadata() or ():
        if key == _DETAILS_TRAILER and isinstance(value, bytes):
            try:
                return status_pb2.Status.FromString(value)
            except DecodeError:
                break
    return status_pb2.Status()


def from_rpc_error(error: grpc.RpcError) -> errors.MillraceError:
    """Converts what a gRPC call raised to our own error, with its reason and fields."""
    # Synchronous and asynchronous calls raise different classes with the same methods.
    call: Any = error
    number, _ = call.code().value
    message = call.details() or call.code().name
    reason, metadata = "ERROR_REASON_UNSPECIFIED", dict[str, str]()
    violations: list[errors.FieldViolation] = []
    for detail in _details_of(call).details:
        if detail.Is(error_details_pb2.ErrorInfo.DESCRIPTOR):
            info = error_details_pb2.ErrorInfo()
            detail.Unpack(info)
            reason, metadata = info.reason, dict(info.metadata)
        elif detail.Is(error_details_pb2.BadRequest.DESCRIPTOR):
            request = error_details_pb2.BadRequest()
            detail.Unpack(request)
            violations = [
                errors.FieldViolation(each.field, each.description) for each in request.field_violations
            ]
    if number == code_pb2.INVALID_ARGUMENT:
        return errors.InvalidArgument(
            violations or [errors.FieldViolation(metadata.get("field", "request"), message)],
            reason=reason,
            metadata=metadata,
        )
    if number == code_pb2.DEADLINE_EXCEEDED:
        return errors.Unavailable(f"no answer within the deadline: {message}")
    kind = next((kind for kind, code in _CODES if code == number), errors.MillraceError)
    return kind(message, reason=reason, metadata=metadata)


def raise_from_rpc_error(error: grpc.RpcError) -> NoReturn:
    """Raises our own form of a gRPC error, chained."""
    raise from_rpc_error(error) from error
