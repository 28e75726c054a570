"""Samples of engines carry the mean utilisation of their own devices, and none that is not known."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
from millrace.core.v1 import replica_pb2, stats_pb2, types_pb2

from core.tasks import cancel_and_wait
from nodeagent.health import Outcome
from nodeagent.replica import Replica, new_replica
from nodeagent.stats import DEVICE_PERIOD_SECONDS, StatsCollector
from tests.support.clock import ManualClock
from tests.support.waiting import eventually


class _Devices:
    """An inventory whose samples are given."""

    def __init__(self, ratios: dict[str, float | None]) -> None:
        self._ratios = ratios
        self.asked = 0

    def sample(self) -> list[stats_pb2.DeviceStats]:
        self.asked += 1
        return [
            stats_pb2.DeviceStats(device_id=name, utilization_ratio=of) for name, of in self._ratios.items()
        ]


class _Engine:
    """Answers every scrape with the same page."""

    async def metrics(self, url: str) -> tuple[Outcome, str]:
        del url
        return Outcome(ok=True), ""

    def parse_metrics(self, text: str) -> stats_pb2.EngineStats:
        del text
        return stats_pb2.EngineStats(running_requests=1)


def _replica(clock: ManualClock, *devices: str) -> Replica:
    assignment = replica_pb2.ReplicaAssignment(
        replica="r",
        devices=[replica_pb2.DeviceClaim(device_id=each) for each in devices],
        launch=replica_pb2.LaunchSpec(engine=types_pb2.ENGINE_VLLM),
    )
    replica = new_replica(assignment, node="n", log_path=Path("log"), clock=clock)
    replica.observation.state = types_pb2.REPLICA_STATE_READY
    return replica


@pytest.mark.parametrize(
    ("claimed", "expected"),
    [
        (("gpu-0", "gpu-1"), 0.5),
        (("gpu-0",), 0.25),
        # One that is not known makes the mean unknown.
        (("gpu-0", "gpu-2"), None),
        (("gpu-0", "gpu-9"), None),
        ((), None),
    ],
)
async def test_utilization_is_the_mean_of_the_replicas_devices(
    claimed: tuple[str, ...], expected: float | None
) -> None:
    clock, engine = ManualClock(), _Engine()
    replica = _replica(clock, *claimed)
    devices: Any = _Devices({"gpu-0": 0.25, "gpu-1": 0.75, "gpu-2": None})
    adapters: Any = {int(types_pb2.ENGINE_VLLM): engine}
    probe: Any = engine
    collector = StatsCollector(
        replicas=lambda: [replica], adapters=adapters, probe=probe, inventory=devices, clock=clock
    )
    running = asyncio.create_task(collector.run(), name="stats")
    try:
        await eventually(collector.device_samples)
        await clock.advance(DEVICE_PERIOD_SECONDS / 2)
        (sample,) = collector.engine_samples()
        told = sample.device_utilization_ratio if sample.HasField("device_utilization_ratio") else None
        assert told == expected
    finally:
        await cancel_and_wait(running)
