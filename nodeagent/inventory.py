"""What this machine has and can start, as the control plane sees it.

In: device sources, adapters, settings. Out: a `NodeInventory`, device samples, and whether claimed memory
is free at the moment. Reading devices can take milliseconds, so callers on the event loop use a thread.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import psutil
from millrace.core.v1 import node_pb2, replica_pb2, stats_pb2

from core import VERSION
from core.clock import Clock, to_timestamp
from nodeagent.cached_models import cached_models, hub_cache
from nodeagent.devices.base import DeviceSource
from nodeagent.engines.base import CannotStart, ClaimedDevice
from nodeagent.engines.registry import EngineAdapters


@dataclass(frozen=True, slots=True)
class MemoryShortage:
    """Less memory is free than a replica claims."""

    device_id: str
    needed_bytes: int
    free_bytes: int

    def __str__(self) -> str:
        return (
            f"device {self.device_id} has {self.free_bytes / 2**30:.1f} GiB free and the replica claims "
            f"{self.needed_bytes / 2**30:.1f} GiB: other programs use the rest"
        )


class Inventory:
    """The machine's devices and engines."""

    def __init__(
        self,
        *,
        node: str,
        advertise_host: str,
        labels: Mapping[str, str],
        sources: Sequence[DeviceSource],
        adapters: EngineAdapters,
        clock: Clock,
    ) -> None:
        """Takes what it reports; nothing is read before a call."""
        self._node = node
        self._advertise_host = advertise_host
        self._labels = dict(labels)
        self._sources = tuple(sources)
        self._adapters = adapters
        self._clock = clock
        # Set once the agent's own server listens.
        self.agent_target = ""

    def read(self) -> node_pb2.NodeInventory:
        """Reads devices and engines anew."""
        return node_pb2.NodeInventory(
            node=self._node,
            version=VERSION,
            agent_target=self.agent_target,
            advertise_host=self._advertise_host,
            devices=self._devices().values(),
            engines=[each for adapter in self._adapters.values() for each in adapter.environments()],
            memory_bytes=psutil.virtual_memory().total,
            processors=psutil.cpu_count() or 0,
            labels=self._labels,
            cached_models=cached_models(hub_cache()),
        )

    def claimed(self, claims: Sequence[replica_pb2.DeviceClaim]) -> list[ClaimedDevice]:
        """Resolves claims to devices.

        Raises:
            CannotStart: A claimed device is not on this machine.
        """
        devices = self._devices()
        for claim in claims:
            if claim.device_id not in devices:
                raise CannotStart(
                    f"device {claim.device_id} is not on node {self._node}; it has: "
                    f"{', '.join(sorted(devices)) or 'none'}"
                )
        return [ClaimedDevice(devices[claim.device_id], claim.memory_bytes) for claim in claims]

    def shortage(self, claims: Sequence[ClaimedDevice]) -> MemoryShortage | None:
        """Returns the first claim that does not fit into what is free now; unknown counts as free."""
        for claim in claims:
            for source in self._sources:
                free = source.free_bytes(claim.device.id)
                if free is not None and free < claim.memory_bytes:
                    return MemoryShortage(claim.device.id, claim.memory_bytes, free)
        return None

    def sample(self) -> list[stats_pb2.DeviceStats]:
        """Samples every device."""
        moment = to_timestamp(self._clock.now())
        samples = [sample for source in self._sources for sample in source.sample()]
        for sample in samples:
            sample.sample_time.CopyFrom(moment)
        return samples

    def _devices(self) -> dict[str, node_pb2.Device]:
        return {device.id: device for source in self._sources for device in source.devices()}
