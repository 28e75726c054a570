"""Values of the contract to etcd's messages and back, and etcd's errors to ours.

In come keys, operations and conditions, out go serialisable requests; in come responses and gRPC
errors, out go values and `StoreError`s. aetcd's generated stubs carry no types: this module and the
stubs in `etcd_channels` are where `Any` ends. Nothing here does I/O.
"""

from collections.abc import Sequence
from typing import Any

import grpc
from aetcd.rpc import kv_pb2, rpc_pb2
from grpc.aio import AioRpcError

from core.store.types import (
    Compacted,
    Compare,
    Delete,
    KeyValue,
    LeaseLost,
    Operation,
    Put,
    StoreError,
    StoreUnavailable,
    WatchEvent,
)

# etcd's texts are short; a proxy's error page is not, and none of it helps a reader.
_DETAILS_LENGTH = 256

# grpc's own words when a connection that stood a moment ago is gone before the request is written.
_UNSENT = "failed to connect to all addresses"

_TOKEN_REFUSED = ("invalid auth token", "revision of auth store is old")


def prefix_end(prefix: bytes) -> bytes:
    """First key behind all keys that begin with `prefix`."""
    stripped = prefix.rstrip(b"\xff")
    # etcd reads a single zero byte as "to the end of all keys".
    return stripped[:-1] + bytes([stripped[-1] + 1]) if stripped else b"\0"


def range_request(prefix: str, *, start_after: str, limit: int, revision: int, keys_only: bool) -> Any:
    """Reads a prefix in key order, beginning behind `start_after`."""
    first = prefix.encode()
    if start_after:
        first = max(first, start_after.encode() + b"\0")
    return rpc_pb2.RangeRequest(
        key=first,
        range_end=prefix_end(prefix.encode()),
        limit=limit,
        revision=revision,
        keys_only=keys_only,
    )


def get_request(key: str) -> Any:
    """Reads one key, linearizably."""
    return rpc_pb2.RangeRequest(key=key.encode())


def transaction_request(operations: Sequence[Operation], compares: Sequence[Compare]) -> Any:
    """Writes all operations if all conditions hold."""
    return rpc_pb2.TxnRequest(
        compare=[_compare(each) for each in compares],
        success=[_operation(each) for each in operations],
    )


def _compare(compare: Compare) -> Any:
    if compare.mod_revision is not None:
        return rpc_pb2.Compare(
            result=rpc_pb2.Compare.EQUAL,
            target=rpc_pb2.Compare.MOD,
            key=compare.key.encode(),
            mod_revision=compare.mod_revision,
        )
    return rpc_pb2.Compare(
        result=rpc_pb2.Compare.EQUAL,
        target=rpc_pb2.Compare.CREATE,
        key=compare.key.encode(),
        create_revision=compare.create_revision,
    )


def _operation(operation: Operation) -> Any:
    match operation:
        case Put(key=key, value=value, lease_id=lease_id):
            put = rpc_pb2.PutRequest(key=key.encode(), value=value, lease=lease_id)
            return rpc_pb2.RequestOp(request_put=put)
        case Delete(key=key):
            return rpc_pb2.RequestOp(request_delete_range=rpc_pb2.DeleteRangeRequest(key=key.encode()))


def watch_request(prefix: str, start_revision: int) -> Any:
    """Creates a watcher; fragments keep a large catch-up below the message limit."""
    return rpc_pb2.WatchRequest(
        create_request=rpc_pb2.WatchCreateRequest(
            key=prefix.encode(),
            range_end=prefix_end(prefix.encode()),
            start_revision=start_revision,
            progress_notify=True,
            fragment=True,
        )
    )


def progress_request() -> Any:
    """Asks a watch stream for a sign of life."""
    return rpc_pb2.WatchRequest(progress_request=rpc_pb2.WatchProgressRequest())


def grant_request(ttl_seconds: int) -> Any:
    """Asks for a lease with an identifier of etcd's choice."""
    return rpc_pb2.LeaseGrantRequest(TTL=ttl_seconds)


def keep_alive_request(lease_id: int) -> Any:
    """Renews a lease once."""
    return rpc_pb2.LeaseKeepAliveRequest(ID=lease_id)


def revoke_request(lease_id: int) -> Any:
    """Ends a lease."""
    return rpc_pb2.LeaseRevokeRequest(ID=lease_id)


def compaction_request(revision: int) -> Any:
    """Forgets history before a revision; `physical` waits until it is done."""
    return rpc_pb2.CompactionRequest(revision=revision, physical=True)


def authenticate_request(username: str, password: str) -> Any:
    """Asks for a token."""
    return rpc_pb2.AuthenticateRequest(name=username, password=password)


def key_value(message: Any) -> KeyValue:
    """Reads etcd's key-value message."""
    return KeyValue(
        key=message.key.decode(),
        value=message.value,
        create_revision=message.create_revision,
        mod_revision=message.mod_revision,
        lease_id=message.lease,
    )


def watch_event(message: Any) -> WatchEvent:
    """Reads etcd's event; an expired lease arrives as a deletion."""
    if message.type == kv_pb2.Event.DELETE:
        return WatchEvent(message.kv.key.decode(), None)
    found = key_value(message.kv)
    return WatchEvent(found.key, found)


def is_token_refused(details: str) -> bool:
    """True when a new token makes the same request pass; etcd has not applied it."""
    return any(text in details for text in _TOKEN_REFUSED)


def is_unanswered(error: AioRpcError) -> bool:
    """True when nobody answered, or a member without a quorum did."""
    return error.code() in {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED}


def is_unsent(error: AioRpcError) -> bool:
    """True when grpc found no connection to send the request over, so that it cannot be applied."""
    return error.code() is grpc.StatusCode.UNAVAILABLE and details_of(error).startswith(_UNSENT)


def details_of(error: AioRpcError) -> str:
    """What the other side said, cut to a readable length."""
    return (error.details() or "")[:_DETAILS_LENGTH]


def to_store_error(error: AioRpcError, doing: str) -> StoreError:
    """Sorts a gRPC error by what the caller can do about it.

    Args:
        error: What grpc raised.
        doing: The call in words, with its key, for the message.
    """
    code, details = error.code(), details_of(error)
    if is_unanswered(error):
        return StoreUnavailable(f"etcd did not answer while {doing}: {details or code.name}")
    if code is grpc.StatusCode.NOT_FOUND and "lease not found" in details:
        return LeaseLost(f"the lease is gone ({doing})")
    return StoreError(f"etcd refused while {doing}: {code.name}: {details}")


def to_range_error(error: AioRpcError, doing: str, revision: int) -> StoreError:
    """Like `to_store_error`, for reads of a past revision."""
    if "required revision has been compacted" in details_of(error):
        # A range does not tell the oldest kept revision; it is at least the next one.
        return Compacted(revision, revision + 1)
    return to_store_error(error, doing)
