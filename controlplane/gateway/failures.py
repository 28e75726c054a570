"""Errors as HTTP: status, and a JSON body that names fields.

In come `MillraceError`s, of this process or from the gRPC side, out come answers of one shape:
`{"error": {"code", "reason", "message", "fields", "requestId"}}`.
"""

from aiohttp import web

from controlplane.gateway import schema
from core import errors
from core.telemetry import REQUEST_ID_HEADER

_NOT_ALLOWED = "METHOD_NOT_ALLOWED"

_STATUS: tuple[tuple[type[errors.MillraceError], int, str], ...] = (
    (errors.InvalidArgument, 400, "INVALID_ARGUMENT"),
    (errors.Unauthenticated, 401, "UNAUTHENTICATED"),
    (errors.PermissionDenied, 403, "PERMISSION_DENIED"),
    (errors.NotFound, 404, "NOT_FOUND"),
    (errors.AlreadyExists, 409, "ALREADY_EXISTS"),
    (errors.Conflict, 409, "ABORTED"),
    (errors.FailedPrecondition, 400, "FAILED_PRECONDITION"),
    (errors.OutOfRange, 410, "OUT_OF_RANGE"),
    (errors.ResourceExhausted, 429, "RESOURCE_EXHAUSTED"),
    (errors.Unavailable, 503, "UNAVAILABLE"),
)
_ETAG_MISMATCH = "ERROR_REASON_ETAG_MISMATCH"
# Of HTTP's own refusals, those that a caller can bring about.
_HTTP_CODES = {404: "NOT_FOUND", 405: _NOT_ALLOWED, 413: "PAYLOAD_TOO_LARGE", 400: "INVALID_ARGUMENT"}
# A store that is being restarted is back within seconds.
_RETRY_AFTER_SECONDS = "2"


def error_response(error: errors.MillraceError, request_id: str) -> web.Response:
    """Makes the answer for an error."""
    status, code = next(
        ((status, code) for kind, status, code in _STATUS if isinstance(error, kind)), (500, "INTERNAL")
    )
    if error.reason == _ETAG_MISMATCH:
        status = 412
    headers = {REQUEST_ID_HEADER: request_id}
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if status in {429, 503}:
        headers["Retry-After"] = _RETRY_AFTER_SECONDS
    return _response(status, code, error.reason, error.message, _fields(error), request_id, headers)


def http_error_response(error: web.HTTPException, message: str, request_id: str) -> web.Response:
    """Makes the answer for one of HTTP's own refusals."""
    fields = [schema.FieldError(field="body", description=message)] if error.status == 413 else []
    headers = {REQUEST_ID_HEADER: request_id}
    if "Allow" in error.headers:
        headers["Allow"] = error.headers["Allow"]
    code = _HTTP_CODES.get(error.status, f"HTTP_{error.status}")
    return _response(error.status, code, "ERROR_REASON_UNSPECIFIED", message, fields, request_id, headers)


def internal_response(request_id: str) -> web.Response:
    """Makes the answer for a fault of our own; its text is in the log only."""
    return _response(
        500,
        "INTERNAL",
        "ERROR_REASON_UNSPECIFIED",
        "internal error; the control plane's log has the details under this request id",
        [],
        request_id,
        {REQUEST_ID_HEADER: request_id},
    )


def _fields(error: errors.MillraceError) -> list[schema.FieldError]:
    if isinstance(error, errors.InvalidArgument):
        return [
            schema.FieldError(field=each.field, description=each.description) for each in error.violations
        ]
    field = error.metadata.get("field")
    if not field:
        return []
    return [schema.FieldError(field=field, description=error.message.removeprefix(f"{field}: "))]


def _response(
    status: int,
    code: str,
    reason: str,
    message: str,
    fields: list[schema.FieldError],
    request_id: str,
    headers: dict[str, str],
) -> web.Response:
    body = schema.ErrorAnswer(
        error=schema.ErrorBody(
            code=code, reason=reason, message=message, fields=fields, request_id=request_id
        )
    )
    return web.Response(
        status=status,
        text=body.model_dump_json(by_alias=True),
        content_type="application/json",
        headers=headers,
    )
