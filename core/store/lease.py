"""Keys that exist for as long as their owner lives.

In come keys and values, which are written under one lease and kept alive by renewing it; when the lease
is lost, by a long outage or a slow process, a new one is granted and every key is written again. What
goes out are the keys in the store. It never gives up and never ends by itself.
"""

import asyncio
from collections.abc import Mapping

import structlog

from core.backoff import Backoff, BackoffPolicy
from core.clock import Clock
from core.store.checks import MAXIMUM_OPERATIONS
from core.store.types import (
    Delete,
    Lease,
    LeaseLost,
    Operation,
    Put,
    Store,
    StoreError,
    StoreUnavailable,
)

_log = structlog.get_logger(__name__)

# Two renewals may fail before the lease is in danger.
_RENEWALS_A_TTL = 3
_BACKOFF = BackoffPolicy(initial_seconds=0.1, maximum_seconds=2.0)


class Presence:
    """Keeps keys alive under a lease. `run` must be running for the keys to outlive the TTL."""

    def __init__(self, store: Store, ttl_seconds: int, clock: Clock) -> None:
        self._store = store
        self._ttl_seconds = ttl_seconds
        self._clock = clock
        self._wanted: dict[str, bytes] = {}
        # Keys whose state in the store is not known to be the wanted one; deletions included.
        self._pending: dict[str, None] = {}
        self._lease: Lease | None = None
        self._lock = asyncio.Lock()
        self._away: StoreError | None = None
        self._backoff = Backoff(_BACKOFF)
        self._closed = False

    @property
    def registered(self) -> bool:
        """True when, to our knowledge, every key stands in the store as wanted."""
        return self._away is None and not self._pending

    async def put(self, key: str, value: bytes) -> None:
        """Writes a key, and again whenever the lease had to be replaced.

        Raises:
            StoreUnavailable: Not written now. It is remembered all the same: `run` writes it when the
                store is back, so that callers who can wait may ignore this.
        """
        await self.put_many({key: value})

    async def put_many(self, values: Mapping[str, bytes]) -> None:
        """Writes several keys, in transactions of at most 128.

        Raises:
            StoreUnavailable: As for `put`.
        """
        self._raise_if_closed()
        self._wanted.update(values)
        self._pending.update(dict.fromkeys(values))
        await self._write_now()

    async def delete(self, key: str) -> None:
        """Deletes a key and no longer keeps it.

        Raises:
            StoreUnavailable: Not deleted now; `run` does so when the store is back.
        """
        self._raise_if_closed()
        self._wanted.pop(key, None)
        self._pending[key] = None
        await self._write_now()

    async def run(self) -> None:
        """Renews at a third of the TTL, for ever. The owner runs it as a named task."""
        while True:
            delay = self._ttl_seconds / _RENEWALS_A_TTL
            async with self._lock:
                try:
                    await self._renew()
                except StoreError as error:
                    delay = min(delay, self._failed(error))
                else:
                    self._succeeded()
            await self._clock.sleep(delay)

    async def close(self) -> None:
        """Revokes the lease, which deletes the keys. Cancel `run` before; best effort within a call."""
        self._closed = True
        async with self._lock:
            lease, self._lease = self._lease, None
            if lease is None:
                return
            try:
                await lease.revoke()
            except StoreError as error:
                _log.warning("lease left to expire", error=str(error))

    async def _write_now(self) -> None:
        # While the store is away callers must not queue up behind one timeout each.
        if self._away is not None:
            raise StoreUnavailable(f"remembered, not written: {self._away}") from self._away
        async with self._lock:
            if self._away is not None:
                raise StoreUnavailable(f"remembered, not written: {self._away}") from self._away
            self._raise_if_closed()
            try:
                await self._write_pending()
            except StoreError as error:
                self._failed(error)
                raise

    async def _renew(self) -> None:
        if self._lease is not None:
            try:
                await self._lease.keep_alive()
            except LeaseLost:
                self._forget_lease()
        if self._wanted or self._pending:
            await self._write_pending()

    async def _write_pending(self) -> None:
        try:
            await self._write_pending_once()
        except LeaseLost:
            self._forget_lease()
            await self._write_pending_once()

    async def _write_pending_once(self) -> None:
        lease = self._lease
        if lease is None:
            lease = self._lease = await self._store.grant_lease(self._ttl_seconds)
            self._pending.update(dict.fromkeys(self._wanted))
        while self._pending:
            # Writers may come while a transaction is under way: only what it wrote is settled.
            written: dict[str, bytes | None] = {
                key: self._wanted.get(key) for key in list(self._pending)[:MAXIMUM_OPERATIONS]
            }
            await self._store.commit([_operation(key, value, lease) for key, value in written.items()])
            for key, value in written.items():
                if self._wanted.get(key) == value:
                    self._pending.pop(key, None)

    def _forget_lease(self) -> None:
        _log.info("lease lost, registering again", keys=len(self._wanted))
        self._lease = None
        self._pending.update(dict.fromkeys(self._wanted))

    def _failed(self, error: StoreError) -> float:
        if self._away is None:
            _log.warning("keys cannot be kept alive", keys=len(self._wanted), error=str(error))
        self._away = error
        return self._backoff.failed()

    def _succeeded(self) -> None:
        if self._away is not None:
            _log.info("keys are kept alive again", keys=len(self._wanted))
        self._away = None
        self._backoff.succeeded()

    def _raise_if_closed(self) -> None:
        if self._closed:
            raise StoreUnavailable("this presence is closed")


def _operation(key: str, value: bytes | None, lease: Lease) -> Operation:
    return Delete(key) if value is None else Put(key, value, lease_id=lease.lease_id)
