"""Every error that Millrace raises on purpose, sorted by what the caller can do about it.

    MillraceError
    ├── InvalidArgument      the caller sent something wrong: names the field and the remedy
    ├── Unauthenticated      no credential, or an unknown one
    ├── PermissionDenied     the role may not do this
    ├── NotFound
    ├── AlreadyExists
    ├── Conflict             changed meanwhile: read again and retry
    ├── FailedPrecondition   not possible in the present state
    ├── OutOfRange           the asked-for version is gone: list again
    ├── ResourceExhausted    a bound was reached
    └── Unavailable          platform fault: the same call can be retried

An error carries a reason of `millrace.core.v1.ErrorReason` and metadata with whatever varies in its
message. Mapping to gRPC and HTTP stands in `core.rpc_errors` and the gateway.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class FieldViolation:
    """One wrong field: its path as the caller wrote it, and what is wrong with the remedy."""

    field: str
    description: str


class MillraceError(Exception):
    """Base of all errors raised on purpose.

    Attributes:
        message: One line for a person, with the remedy where one is known.
        reason: Name of a `millrace.core.v1.ErrorReason` value.
        metadata: Everything that varies in the message.
    """

    reason: str = "ERROR_REASON_UNSPECIFIED"

    def __init__(
        self, message: str, *, reason: str | None = None, metadata: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        if reason is not None:
            self.reason = reason
        self.metadata: dict[str, str] = dict(metadata or {})


class InvalidArgument(MillraceError):
    """The caller sent something wrong."""

    reason = "ERROR_REASON_FIELD_INVALID"

    def __init__(
        self,
        violations: Sequence[FieldViolation],
        *,
        reason: str | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        message = "; ".join(f"{each.field}: {each.description}" for each in violations)
        first = {"field": violations[0].field} if violations else {}
        super().__init__(message, reason=reason, metadata={**first, **(metadata or {})})
        self.violations = tuple(violations)

    @classmethod
    def of(cls, field: str, description: str, *, reason: str | None = None) -> "InvalidArgument":
        """Builds the common case of a single wrong field."""
        return cls([FieldViolation(field, description)], reason=reason)


class Unauthenticated(MillraceError):
    """No credential came, or it is not known."""

    reason = "ERROR_REASON_CREDENTIAL_INVALID"


class PermissionDenied(MillraceError):
    """The credential's role may not do this."""

    reason = "ERROR_REASON_ROLE_INSUFFICIENT"


class NotFound(MillraceError):
    """The resource does not exist."""

    reason = "ERROR_REASON_NOT_FOUND"


class AlreadyExists(MillraceError):
    """The resource exists already."""

    reason = "ERROR_REASON_ALREADY_EXISTS"


class Conflict(MillraceError):
    """The resource changed meanwhile."""

    reason = "ERROR_REASON_CONFLICT"


class FailedPrecondition(MillraceError):
    """Not possible in the present state."""


class OutOfRange(MillraceError):
    """The asked-for version is gone."""

    reason = "ERROR_REASON_RESOURCE_VERSION_TOO_OLD"


class ResourceExhausted(MillraceError):
    """A bound was reached."""


class Unavailable(MillraceError):
    """A platform fault; the same call can be retried."""
