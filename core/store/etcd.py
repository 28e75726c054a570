"""The store on etcd, over gRPC.

In come calls of `core.store.types.Store`, out go requests through `etcd_channels`. Values are
translated by `etcd_wire`, watches are kept by `etcd_watch`. Only aetcd's generated stubs are used: its
client knows one insecure address, and its watcher dies with its stream.
"""

from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import grpc
from grpc.aio import AioRpcError

from core.store import etcd_wire as wire
from core.store import keys
from core.store.checks import check_range, check_transaction, check_watch
from core.store.etcd_channels import Channels, Member
from core.store.etcd_settings import EtcdSettings
from core.store.etcd_watch import EtcdWatch
from core.store.types import (
    Commit,
    Compare,
    KeyValue,
    Lease,
    LeaseLost,
    Operation,
    Page,
    StoreError,
    WatchBatch,
)

# Keys of one range request, so that a large prefix needs no giant message.
_PIECE = 1000


class EtcdStore:
    """`Store` on one or several etcd members.

    Making one does no I/O; `connect` also proves that etcd answers. Belongs to one event loop.
    """

    def __init__(self, settings: EtcdSettings) -> None:
        self._channels = Channels(settings)

    @classmethod
    async def connect(cls, settings: EtcdSettings) -> Self:
        """Opens the store and reads once.

        Raises:
            StoreUnavailable: No member answered within the request timeout.
            StoreError: etcd refused us: wrong password, no permission.
        """
        store = cls(settings)
        try:
            await store.get(keys.ROOT)
        except BaseException:
            await store.close()
            raise
        return store

    async def close(self) -> None:
        """Closes all connections; pending calls and watches fail with StoreUnavailable."""
        await self._channels.close()

    async def get(self, key: str) -> KeyValue | None:
        """Reads one key, linearizably."""
        answer = await self._call(
            lambda member: member.kv.Range, wire.get_request(key), f"reading {key}", may_repeat=True
        )
        return wire.key_value(answer.kvs[0]) if answer.kvs else None

    async def list(
        self,
        prefix: str,
        *,
        start_after: str = "",
        limit: int = 0,
        revision: int = 0,
        keys_only: bool = False,
    ) -> Page:
        """Reads a prefix as of one revision, in pieces."""
        check_range(prefix, limit=limit, revision=revision)
        items: list[KeyValue] = []
        while True:
            wanted = min(_PIECE, limit - len(items)) if limit else _PIECE
            request = wire.range_request(
                prefix,
                start_after=start_after,
                limit=wanted,
                revision=revision,
                keys_only=keys_only,
            )
            answer = await self._range(request, f"listing {prefix}", revision)
            revision = revision or answer.header.revision
            items.extend(wire.key_value(each) for each in answer.kvs)
            if not answer.more or len(items) == limit:
                return Page(tuple(items), revision, bool(answer.more))
            start_after = items[-1].key

    async def commit(self, operations: Sequence[Operation], *, compares: Sequence[Compare] = ()) -> Commit:
        """Writes all or nothing; never sent twice."""
        check_transaction(operations, compares)
        first = operations[0].key if operations else compares[0].key
        others = len(operations) - 1
        doing = f"writing {first}" + (f" and {others} more" if others > 0 else "")
        answer = await self._call(
            lambda member: member.kv.Txn,
            wire.transaction_request(operations, compares),
            doing,
            may_repeat=False,
        )
        return Commit(bool(answer.succeeded), answer.header.revision)

    async def grant_lease(self, ttl_seconds: int) -> Lease:
        """Grants a lease; etcd may grant a longer one than asked for, never a shorter."""
        answer = await self._call(
            lambda member: member.lease.LeaseGrant,
            wire.grant_request(ttl_seconds),
            "granting a lease",
            # A lease granted twice lapses by itself.
            may_repeat=True,
        )
        return _EtcdLease(self._channels, answer.ID, float(answer.TTL))

    def watch(self, prefix: str, *, start_revision: int) -> AsyncGenerator[WatchBatch, None]:
        """Yields changes from a revision on; see the contract."""
        check_watch(prefix, start_revision)
        return EtcdWatch(self._channels, prefix, start_revision).batches()

    async def compact(self, revision: int) -> None:
        """Forgets history before a revision. Maintenance: etcd does it by itself where set up so."""
        await self._call(
            lambda member: member.kv.Compact,
            wire.compaction_request(revision),
            f"compacting to {revision}",
            may_repeat=False,
        )

    async def _range(self, request: Any, doing: str, revision: int) -> Any:
        try:
            return await self._channels.call(
                lambda member: member.kv.Range, request, doing=doing, may_repeat=True
            )
        except AioRpcError as error:
            raise wire.to_range_error(error, doing, revision) from error

    async def _call(
        self, method: Callable[[Member], Any], request: Any, doing: str, *, may_repeat: bool
    ) -> Any:
        return await _translated(self._channels, method, request, doing, may_repeat=may_repeat)


@dataclass(frozen=True, slots=True)
class _EtcdLease:
    """A lease in etcd."""

    _channels: Channels
    lease_id: int
    ttl_seconds: float

    async def keep_alive(self) -> None:
        """Renews once, over a stream of its own: renewals are rare and streams are cheap."""
        answer = await _translated(
            self._channels,
            lambda member: _first_answer(member.lease.LeaseKeepAlive),
            wire.keep_alive_request(self.lease_id),
            "renewing a lease",
            may_repeat=True,
        )
        if answer.TTL <= 0:
            raise LeaseLost("the lease has expired or was revoked")

    async def revoke(self) -> None:
        """Ends the lease and deletes its keys; already gone is fine."""
        try:
            await _translated(
                self._channels,
                lambda member: member.lease.LeaseRevoke,
                wire.revoke_request(self.lease_id),
                "revoking a lease",
                may_repeat=True,
            )
        except LeaseLost:
            return


async def _translated(
    channels: Channels,
    method: Callable[[Member], Any],
    request: Any,
    doing: str,
    *,
    may_repeat: bool,
) -> Any:
    try:
        return await channels.call(method, request, doing=doing, may_repeat=may_repeat)
    except AioRpcError as error:
        raise wire.to_store_error(error, doing) from error


def _first_answer(stream: Any) -> Callable[..., Any]:
    """Makes a bidirectional stream look like a call with one request and one answer."""

    async def ask(request: Any, *, timeout: float, metadata: Any) -> Any:  # noqa: ASYNC109 - grpc's name
        call = stream(timeout=timeout, metadata=metadata)
        try:
            await call.write(request)
            answer = await call.read()
            if answer is grpc.aio.EOF:
                raise StoreError("etcd ended the stream of lease renewals without an answer")
            # Both sides end in good order: grpc keeps some kilobytes of every call that is cancelled.
            await call.done_writing()
            await call.read()
        finally:
            if not call.done():
                call.cancel()
        return answer

    return ask
