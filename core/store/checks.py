"""What every store refuses before it asks anybody: the bounds of the contract, in one place.

In come the arguments of a call, out comes a `ValueError` that names what is wrong. A wrong argument is
a bug of the caller, hence not a `MillraceError`. Nothing here does I/O.
"""

from collections.abc import Sequence

from core.store.types import Compare, Operation

# etcd's own default (`--max-txn-ops`); the in-memory store keeps to it so that no plan outgrows etcd.
MAXIMUM_OPERATIONS = 128


def check_transaction(operations: Sequence[Operation], compares: Sequence[Compare]) -> None:
    """Raises ValueError for a transaction that etcd would refuse."""
    if len(operations) > MAXIMUM_OPERATIONS or len(compares) > MAXIMUM_OPERATIONS:
        raise ValueError(
            f"{len(operations)} operations and {len(compares)} conditions in one transaction; "
            f"at most {MAXIMUM_OPERATIONS} of each: split it"
        )
    if not operations and not compares:
        raise ValueError("a transaction needs at least one operation or condition")
    written: set[str] = set()
    for operation in operations:
        if not operation.key:
            raise ValueError("a key must not be empty")
        if operation.key in written:
            raise ValueError(f"{operation.key} is written twice in one transaction")
        written.add(operation.key)
    for compare in compares:
        if (compare.mod_revision is None) == (compare.create_revision is None):
            raise ValueError(
                f"the condition on {compare.key} needs exactly one of mod_revision, create_revision"
            )


def check_range(prefix: str, *, limit: int = 0, revision: int = 0) -> None:
    """Raises ValueError for a range that cannot be meant."""
    if not prefix:
        raise ValueError("a prefix must not be empty")
    if limit < 0 or revision < 0:
        raise ValueError(f"limit ({limit}) and revision ({revision}) must not be negative")


def check_watch(prefix: str, start_revision: int) -> None:
    """Raises ValueError for a watch that could not be resumed."""
    if not prefix:
        raise ValueError("a prefix must not be empty")
    if start_revision < 1:
        raise ValueError(f"start_revision must be at least 1, not {start_revision}")
