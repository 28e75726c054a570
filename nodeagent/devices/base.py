"""The seam between the agent and a kind of device.

Out: the devices, samples of how busy they are, and how much of their memory is free at the moment.
Whatever cannot be read is unknown (None or unset), never zero.
"""

from collections.abc import Sequence
from typing import Protocol

from millrace.core.v1 import node_pb2, stats_pb2


class DeviceSource(Protocol):
    """Devices of one kind. Calls may block for some milliseconds and run in a thread."""

    def devices(self) -> Sequence[node_pb2.Device]:
        """Lists the devices; empty where this kind is absent."""
        ...

    def sample(self) -> Sequence[stats_pb2.DeviceStats]:
        """Reads how busy the devices are, without time stamps."""
        ...

    def free_bytes(self, device_id: str) -> int | None:
        """Returns the memory that is free now; None where it is unknown."""
        ...
