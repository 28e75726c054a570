"""Who leads: one holder of the key `live/leader`, under a short lease, with a fencing token.

In comes a member that wants to lead, out comes the token when it does: the create revision of the key.
Every write of the leader carries `compare()`, so that a leader which does not know yet that it was
replaced cannot write. `lost` is a courtesy on top: it says so as early as our own clock allows.
"""

import asyncio
from contextlib import aclosing

import structlog
from google.protobuf.message import DecodeError
from millrace.state.v1 import records_pb2

from core.backoff import Backoff, BackoffPolicy
from core.clock import Clock, to_timestamp
from core.errors import FailedPrecondition
from core.store import keys
from core.store.types import (
    Compare,
    Delete,
    KeyValue,
    Lease,
    LeaseLost,
    Put,
    Store,
    StoreError,
)
from core.store.waiting import within
from core.tasks import cancel_and_wait

_log = structlog.get_logger(__name__)

# How long the lead outlives a dead leader: another takes over within this, half a second in which etcd
# looks for expired leases, and its first listing. Shorter, and an election of etcd's own would end leads.
LEAD_SECONDS = 3
_RENEWALS_A_TTL = 3
# A renewal that failed is tried again sooner: what is left of the lease is short.
_RETRIES_A_TTL = 10
_BACKOFF = BackoffPolicy(initial_seconds=0.1, maximum_seconds=1.0)


class Leadership:
    """Campaigns for the lead and holds it.

    Attributes:
        lost: Set when the lead may have ended: renewals failed for a TTL, the key changed hands, or we
            resigned. Cleared by `acquire`.
    """

    def __init__(
        self,
        store: Store,
        member_id: str,
        payload: records_pb2.LeaderRecord,
        *,
        clock: Clock,
        ttl_seconds: int = LEAD_SECONDS,
    ) -> None:
        """Prepares a campaign; does no I/O.

        Args:
            store: Where the key lives.
            member_id: Stable identity of the process's data folder: a restart keeps it. Two live
                processes with one identity would take the lead from each other for ever.
            payload: What others may read about the leader; member and time are filled in here.
            clock: Measures our side of the lease.
            ttl_seconds: How long the lead outlives a dead leader.
        """
        self.lost = asyncio.Event()
        self._store = store
        self._member_id = member_id
        self._payload = payload
        self._clock = clock
        self._ttl_seconds = ttl_seconds
        self._lease: Lease | None = None
        self._fencing: int | None = None
        self._renewal: asyncio.Task[None] | None = None

    @property
    def held(self) -> bool:
        """True while, to our knowledge, we lead."""
        return self._fencing is not None and not self.lost.is_set()

    def compare(self) -> Compare:
        """Returns the condition to put into every commit: true only while our lead lasts.

        Raises:
            FailedPrecondition: We never led.
        """
        if self._fencing is None:
            raise FailedPrecondition("this process has not been elected leader")
        return Compare(keys.LIVE_LEADER, create_revision=self._fencing)

    async def acquire(self) -> int:
        """Waits, as long as it takes, until we lead; then keeps the lead until `resign`.

        Returns:
            The fencing token, larger than that of every leader before.
        """
        await self._stop_renewal()
        self._fencing = None
        backoff = Backoff(_BACKOFF)
        while True:
            try:
                elected = await self._campaign()
            except StoreError as error:
                log = _log.warning if backoff.failures == 0 else _log.debug
                log("campaign interrupted", error=str(error))
                await self._clock.sleep(backoff.failed())
                continue
            if elected is not None:
                lease, fencing, renewed_at = elected
                self._lease, self._fencing = lease, fencing
                self.lost.clear()
                self._renewal = asyncio.create_task(
                    self._hold(lease, fencing, renewed_at), name="leadership-renewal"
                )
                _log.info("elected leader", member=self._member_id, create_revision=fencing)
                return fencing
            backoff.succeeded()

    async def resign(self) -> None:
        """Gives the lead back at once, so that the next leader need not wait for the lease to expire."""
        await self._stop_renewal()
        self.lost.set()
        lease, self._lease = self._lease, None
        if lease is not None:
            await _revoke(lease)

    async def _campaign(self) -> tuple[Lease, int, float] | None:
        """Tries once; waits for the present leader to go where there is one."""
        current = await self._store.get(keys.LIVE_LEADER)
        if current is not None and self._is_own(current):
            # A former life of ours. Deleting first makes a new create revision, hence a new token.
            await self._store.commit(
                [Delete(keys.LIVE_LEADER)],
                compares=[Compare(keys.LIVE_LEADER, mod_revision=current.mod_revision)],
            )
        elif current is not None:
            await self._wait_for_vacancy(current.mod_revision)
        sent_at = self._clock.monotonic()
        lease = await self._store.grant_lease(self._ttl_seconds)
        try:
            commit = await self._store.commit(
                [Put(keys.LIVE_LEADER, self._record(), lease_id=lease.lease_id)],
                compares=[Compare(keys.LIVE_LEADER, mod_revision=0)],
            )
        except StoreError:
            # Applied or not: the next try finds our own record, or nobody's.
            await _revoke(lease)
            raise
        if commit.succeeded:
            return lease, commit.revision, sent_at
        await _revoke(lease)
        return None

    async def _wait_for_vacancy(self, revision: int) -> None:
        watch = self._store.watch(keys.LIVE_LEADER, start_revision=revision + 1)
        async with aclosing(watch) as batches:
            async for batch in batches:
                for event in batch.events:
                    if event.key == keys.LIVE_LEADER and event.value is None:
                        return

    async def _hold(self, lease: Lease, fencing: int, renewed_at: float) -> None:
        """Renews until the lead ends, then says so."""
        interval = self._ttl_seconds / _RENEWALS_A_TTL
        try:
            while True:
                # From before the renewal was sent: etcd counts from later, so we never count longer.
                deadline = renewed_at + self._ttl_seconds
                pause = min(interval, deadline - self._clock.monotonic())
                await self._clock.sleep(max(0.0, pause))
                sent_at = self._clock.monotonic()
                if sent_at >= deadline:
                    _log.warning("lead lost: it could not be renewed within its lease")
                    return
                try:
                    still_ours = await within(
                        self._clock,
                        deadline - sent_at,
                        self._renew(lease, fencing),
                        name="leadership-renew",
                    )
                except LeaseLost:
                    _log.warning("lead lost: the lease has expired")
                    return
                except (StoreError, TimeoutError) as error:
                    _log.warning("lead could not be renewed", error=str(error))
                    interval = self._ttl_seconds / _RETRIES_A_TTL
                    continue
                if not still_ours:
                    _log.warning("lead lost: the key has changed hands")
                    return
                renewed_at = sent_at
                interval = self._ttl_seconds / _RENEWALS_A_TTL
        finally:
            self.lost.set()

    async def _renew(self, lease: Lease, fencing: int) -> bool:
        await lease.keep_alive()
        current = await self._store.get(keys.LIVE_LEADER)
        return current is not None and current.create_revision == fencing

    async def _stop_renewal(self) -> None:
        renewal, self._renewal = self._renewal, None
        await cancel_and_wait(renewal)

    def _record(self) -> bytes:
        record = records_pb2.LeaderRecord()
        record.CopyFrom(self._payload)
        record.member_id = self._member_id
        record.acquire_time.CopyFrom(to_timestamp(self._clock.now()))
        return record.SerializeToString()

    def _is_own(self, current: KeyValue) -> bool:
        try:
            return records_pb2.LeaderRecord.FromString(current.value).member_id == self._member_id
        except DecodeError:
            return False


async def _revoke(lease: Lease) -> None:
    try:
        await lease.revoke()
    except StoreError as error:
        _log.info("leader's lease left to expire", error=str(error))
