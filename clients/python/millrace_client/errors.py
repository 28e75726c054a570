"""Every error that the client raises on purpose, sorted by what the caller can do about it.

    MillraceError
    ├── ContextError         the client does not know where to talk to, or with which credential
    ├── InvalidArgument      the caller sent something wrong: `violations` names each field
    ├── Unauthenticated      no credential, or an unknown one
    ├── PermissionDenied     the credential's role may not do this
    ├── NotFound
    ├── AlreadyExists
    ├── Conflict             changed meanwhile: read again and retry
    ├── FailedPrecondition   not possible in the present state
    ├── OutOfRange           the asked-for version is gone: list again
    ├── ResourceExhausted    a bound was reached
    ├── Unavailable          the same call can be retried
    │   └── DeadlineExceeded no answer in time; a mutation may or may not have happened
    └── ServerFault          the server broke; its log has the details

In comes nothing but text; what gRPC raised becomes one of these in `rpc_status`, and only there. This
module imports no transport, so that a command line can name errors without loading one.
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
        reason: Name of a `millrace.core.v1.ErrorReason` value; empty where the server gave none.
        metadata: Everything that varies in the message, as the server sent it.
    """

    def __init__(self, message: str, *, reason: str = "", metadata: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.reason = reason
        self.metadata: dict[str, str] = dict(metadata or {})


class ContextError(MillraceError):
    """The client does not know where to talk to, or with which credential."""


class InvalidArgument(MillraceError):
    """The caller sent something wrong.

    Attributes:
        violations: Each wrong field; empty where the server named none.
    """

    def __init__(
        self,
        message: str,
        *,
        reason: str = "",
        metadata: Mapping[str, str] | None = None,
        violations: Sequence[FieldViolation] = (),
    ) -> None:
        super().__init__(message, reason=reason, metadata=metadata)
        self.violations = tuple(violations)


class Unauthenticated(MillraceError):
    """No credential came, or it is not known."""


class PermissionDenied(MillraceError):
    """The credential's role may not do this."""


class NotFound(MillraceError):
    """The resource does not exist."""


class AlreadyExists(MillraceError):
    """The resource exists already."""


class Conflict(MillraceError):
    """The resource changed meanwhile; read it again and retry."""


class FailedPrecondition(MillraceError):
    """Not possible in the present state."""


class OutOfRange(MillraceError):
    """The asked-for version is gone; list again."""


class ResourceExhausted(MillraceError):
    """A bound was reached."""


class Unavailable(MillraceError):
    """Nobody answered, or the platform cannot at the moment; the same call can be retried."""


class DeadlineExceeded(Unavailable):
    """No answer came in time; a mutation may or may not have happened."""


class ServerFault(MillraceError):
    """The server broke, or does not speak this contract."""
