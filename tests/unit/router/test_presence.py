"""What a router worker tells the cluster of itself, and how often."""

import asyncio

from millrace.state.v1 import records_pb2

from core.clock import SystemClock
from core.store import keys
from core.store.memory import MemoryStore
from core.tasks import cancel_and_wait
from router.presence import announce


class Demand:
    """A worker with one deployment."""

    def __init__(self) -> None:
        self.parked = asyncio.Event()
        self.parked_requests = 0

    def demand(self) -> list[records_pb2.DeploymentDemand]:
        return [
            records_pb2.DeploymentDemand(
                namespace="a", deployment="d", parked_requests=self.parked_requests, requests_total=7
            )
        ]


async def test_demand_is_told_at_once_when_a_request_parks() -> None:
    store, demand = MemoryStore(SystemClock()), Demand()
    task = asyncio.create_task(
        announce(store, SystemClock(), router_id="r", url="http://r", demand=demand), name="presence"
    )

    async def told() -> records_pb2.RouterRecord | None:
        item = await store.get(keys.live_router("r"))
        return None if item is None else records_pb2.RouterRecord.FromString(item.value)

    async def parked() -> int:
        record = await told()
        return record.demand[0].parked_requests if record is not None and record.demand else -1

    try:
        demand.parked.set()
        while await parked() != 0:  # noqa: ASYNC110 - the store has no event for a write
            await asyncio.sleep(0)
        demand.parked_requests = 3
        demand.parked.set()
        while await parked() != 3:  # noqa: ASYNC110 - as above
            await asyncio.sleep(0)
        assert not demand.parked.is_set()
        record = await told()
        assert record is not None
        assert (record.url, record.demand[0].requests_total) == ("http://r", 7)
    finally:
        await cancel_and_wait(task)
    assert await told() is None
    await store.close()
