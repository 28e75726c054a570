"""Tells the cluster that this router worker lives and what is asked of it: `live/routers/<id>` under a lease.

In come an identity, a store and the demand, out goes one leased record, written again when the demand has
changed: at most once a second, and at once when a request begins to wait for a deployment without endpoints.
A router needs no more than a read-only role to serve, so that a refused write is a line in the log and
nothing else.
"""

import asyncio
import secrets
from collections.abc import Sequence
from contextlib import suppress
from typing import Protocol

import structlog
from millrace.state.v1 import records_pb2

from core import VERSION
from core.clock import Clock, to_timestamp
from core.store import Store, StoreError, StoreUnavailable, keys
from core.store.lease import Presence

_log = structlog.get_logger(__name__)

# A dead router is gone from lists within this, and a short pause of etcd does not unlist a living one.
TTL_SECONDS = 10
CLOSE_SECONDS = 1.0
# The autoscaler looks once a second.
DEMAND_SECONDS = 1.0
# Least time between two writes, whoever parks.
DEMAND_SECONDS_MIN = 0.1


class DemandSource(Protocol):
    """Knows what is asked of this worker.

    Attributes:
        parked: Set when a request begins to wait for a deployment without endpoints.
    """

    parked: asyncio.Event

    def demand(self) -> Sequence[records_pb2.DeploymentDemand]:
        """Returns the demand as it is now."""
        ...


def new_router_id() -> str:
    """Makes the identity of one run of a worker."""
    return secrets.token_hex(8)


async def announce(store: Store, clock: Clock, *, router_id: str, url: str, demand: DemandSource) -> None:
    """Keeps the record alive and true until cancelled, then removes it."""
    record = records_pb2.RouterRecord(
        router_id=router_id, url=url, version=VERSION, start_time=to_timestamp(clock.now())
    )
    presence = Presence(store, TTL_SECONDS, clock)
    try:
        try:
            # Remembered by `presence` and written by `run` when the store is back.
            with suppress(StoreUnavailable):
                await presence.put(keys.live_router(router_id), record.SerializeToString())
        except StoreError as error:
            _log.info("router is not listed in the cluster: the store refuses writes", error=str(error))
            await asyncio.Event().wait()
        async with asyncio.TaskGroup() as group:
            group.create_task(presence.run(), name="presence-lease")
            group.create_task(_tell(presence, record, demand), name="presence-demand")
    finally:
        # An absent store must not hold up the end of the process: the lease expires by itself.
        with suppress(StoreError, TimeoutError):
            async with asyncio.timeout(CLOSE_SECONDS):
                await presence.close()


async def _tell(presence: Presence, record: records_pb2.RouterRecord, demand: DemandSource) -> None:
    """Writes the record whenever the demand has changed, for ever."""
    while True:
        with suppress(TimeoutError):
            async with asyncio.timeout(DEMAND_SECONDS):
                await demand.parked.wait()
        demand.parked.clear()
        found = demand.demand()
        if list(record.demand) != list(found):
            del record.demand[:]
            record.demand.extend(found)
            # As above: the record of the moment when the store is back is written then.
            with suppress(StoreUnavailable):
                await presence.put(keys.live_router(record.router_id), record.SerializeToString())
        await asyncio.sleep(DEMAND_SECONDS_MIN)
