"""Tells the cluster that this router worker lives: `live/routers/<id>` under a lease.

In come an identity and a store, out goes one leased record. A router needs no more than a read-only role
to serve, so that a refused write is a line in the log and nothing else.
"""

import asyncio
import secrets
from contextlib import suppress

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


def new_router_id() -> str:
    """Makes the identity of one run of a worker."""
    return secrets.token_hex(8)


async def announce(store: Store, clock: Clock, *, router_id: str, url: str) -> None:
    """Keeps the record alive until cancelled, then removes it."""
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
        await presence.run()
    finally:
        # An absent store must not hold up the end of the process: the lease expires by itself.
        with suppress(StoreError, TimeoutError):
            async with asyncio.timeout(CLOSE_SECONDS):
                await presence.close()
