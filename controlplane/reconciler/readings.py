"""What is known of autoscaled deployments at this moment: engines' samples and routers' demand.

In come the mirrors of `stats/` and `live/routers/`, out come `Reading` values. A sample's age counts from
when it arrived here, since agents' clocks may differ from ours. It decides nothing and writes nothing.
"""

import asyncio
from collections.abc import Callable, Collection, Iterable, Mapping
from datetime import datetime

from millrace.core.v1 import replica_pb2, stats_pb2, types_pb2
from millrace.state.v1 import records_pb2

from controlplane.scheduler.autoscale import Demand, Measure, Reading
from core.clock import Clock, from_timestamp
from core.store import Store, keys
from core.store.mirror import Mirror

# Engines are sampled once a second: one that missed five is not known.
SAMPLE_AGE_SECONDS_MAX = 5.0


class Gauges:
    """Mirrors of samples and routers. `run` must be running."""

    def __init__(self, store: Store, clock: Clock) -> None:
        self._clock = clock
        self._stats: Mirror[stats_pb2.EngineStats] = Mirror(
            store, keys.STATS, stats_pb2.EngineStats.FromString, name="autoscaler stats", clock=clock
        )
        self._routers: Mirror[records_pb2.RouterRecord] = Mirror(
            store,
            keys.LIVE_ROUTERS,
            records_pb2.RouterRecord.FromString,
            name="autoscaler routers",
            clock=clock,
        )
        self._heard: dict[str, float] = {}
        self._stats.subscribe(self._note)

    def subscribe(self, parked: Callable[[], None]) -> None:
        """Has a function called when a router says that requests wait for a deployment without endpoints."""

        def look(changed: frozenset[str]) -> None:
            records = (self._routers.get(key) for key in changed)
            if any(each.parked_requests for record in records if record for each in record.demand):
                parked()

        self._routers.subscribe(look)

    async def run(self) -> None:
        """Keeps the mirrors running until cancelled."""
        async with asyncio.TaskGroup() as group:
            for mirror in (self._stats, self._routers):
                group.create_task(mirror.run(), name=mirror.name)

    async def wait_synced(self, timeout_seconds: float) -> None:
        """Waits for the first listing.

        Raises:
            StoreUnavailable: It did not come in time.
        """
        await self._stats.wait_synced(timeout_seconds)
        await self._routers.wait_synced(timeout_seconds)

    def demands(self) -> dict[str, list[records_pb2.DeploymentDemand]]:
        """What routers see, by `namespace/deployment`."""
        found: dict[str, list[records_pb2.DeploymentDemand]] = {}
        for record in self._routers.items.values():
            for each in record.demand:
                found.setdefault(f"{each.namespace}/{each.deployment}", []).append(each)
        return found

    @property
    def routers(self) -> int:
        """Routers that report."""
        return len(self._routers.items)

    def fresh(self, name: str, replica: str) -> stats_pb2.EngineStats | None:
        """The sample of a replica; None for one that is missing or too old."""
        key = f"{keys.STATS}{name}/{replica}"
        heard = self._heard.get(key)
        if heard is None or self._clock.monotonic() - heard > SAMPLE_AGE_SECONDS_MAX:
            return None
        return self._stats.get(key)

    def _note(self, changed: frozenset[str]) -> None:
        now = self._clock.monotonic()
        for key in changed:
            if self._stats.get(key) is None:
                self._heard.pop(key, None)
            else:
                self._heard[key] = now


def serving_replicas(
    assignments: Iterable[replica_pb2.ReplicaAssignment],
    observations: Mapping[str, replica_pb2.ReplicaObservation],
    uid: str,
) -> list[str]:
    """Replicas of a deployment that take requests.

    Args:
        assignments: Of the deployment's name.
        observations: By replica.
        uid: Of the deployment; others' replicas are left out.
    """
    found: list[str] = []
    for each in assignments:
        observed = observations.get(each.replica)
        if (
            each.deployment_uid == uid
            and each.desired_state == types_pb2.REPLICA_STATE_READY
            and observed is not None
            and observed.healthy
            and observed.state == types_pb2.REPLICA_STATE_READY
        ):
            found.append(each.replica)
    return found


def on_cpu_shares(
    assignments: Iterable[replica_pb2.ReplicaAssignment],
    nodes: Mapping[str, records_pb2.NodeObservationRecord],
) -> set[str]:
    """Replicas on a share of a CPU, whose utilisation is everybody's on that machine and not their own.

    Args:
        assignments: Of the deployment's name.
        nodes: What fleet knows, by full key.
    """
    found: set[str] = set()
    for each in assignments:
        node = nodes.get(keys.ACTUAL_NODES + each.node)
        claimed = {claim.device_id for claim in each.devices}
        devices = node.inventory.devices if node is not None else ()
        if any(device.id in claimed and device.kind == types_pb2.DEVICE_KIND_CPU for device in devices):
            found.add(each.replica)
    return found


def reading_of(
    now: datetime,
    serving: int,
    samples: Iterable[stats_pb2.EngineStats],
    demands: Iterable[records_pb2.DeploymentDemand],
    *,
    routers: int,
    cpu_shares: Collection[str] = (),
) -> Reading:
    """Sums up a moment.

    Args:
        now: The moment.
        serving: Replicas that take requests.
        samples: The fresh samples of those replicas.
        demands: What routers see of the deployment.
        routers: Routers that report at all.
        cpu_shares: Replicas that have no utilisation of their own.
    """
    found = list(samples)
    return Reading(
        time=now,
        serving=serving,
        sampled=len(found),
        running=_measure(found, "running_requests"),
        waiting=_measure(found, "waiting_requests"),
        utilization=_measure(
            [each for each in found if each.replica not in cpu_shares], "device_utilization_ratio"
        ),
        kv_usage=_measure(found, "kv_usage_ratio"),
        demand=demand_of(demands) if routers else None,
    )


def demand_of(demands: Iterable[records_pb2.DeploymentDemand]) -> Demand:
    """Adds up what routers see; the slowest of them speaks for the time to first token."""
    found = list(demands)
    latencies = [each.first_token_p99_ms for each in found if each.HasField("first_token_p99_ms")]
    times = [from_timestamp(each.last_request_time) for each in found]
    return Demand(
        in_flight=sum(each.in_flight_requests for each in found),
        queued=sum(each.queued_requests for each in found),
        parked=sum(each.parked_requests for each in found),
        last_request_time=max((each for each in times if each is not None), default=None),
        first_token_p99_ms=max(latencies, default=None),
    )


def _measure(samples: Iterable[stats_pb2.EngineStats], name: str) -> Measure:
    values = [
        float(getattr(each, name))
        for each in samples
        if each.HasField(name)  # type: ignore[arg-type]  # a name of the message
    ]
    return Measure(sum(values), len(values))
