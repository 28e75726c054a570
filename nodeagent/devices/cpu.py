"""The CPU share: a part of the machine's processors and main memory, as one device named `cpu`."""

from collections.abc import Sequence
from pathlib import Path

import psutil
from millrace.core.v1 import node_pb2, stats_pb2, types_pb2

DEVICE_ID = "cpu"
_CPUINFO = Path("/proc/cpuinfo")
_UNKNOWN_PRODUCT = "unknown processor"


class CpuDevices:
    """One device whose memory is a fraction of the machine's."""

    def __init__(self, memory_fraction: float) -> None:
        """Takes the share of main memory that engines may use, 0 to 1."""
        self._memory_bytes = int(psutil.virtual_memory().total * memory_fraction)
        # The first reading since start-up has no interval to speak of and is always 0.
        psutil.cpu_percent(interval=None)

    def devices(self) -> Sequence[node_pb2.Device]:
        """Lists the one device."""
        return [
            node_pb2.Device(
                id=DEVICE_ID,
                kind=types_pb2.DEVICE_KIND_CPU,
                product=_product(),
                memory_bytes=self._memory_bytes,
                index=0,
            )
        ]

    def sample(self) -> Sequence[stats_pb2.DeviceStats]:
        """Reads processor use since the last call, and main memory in use."""
        memory = psutil.virtual_memory()
        return [
            stats_pb2.DeviceStats(
                device_id=DEVICE_ID,
                utilization_ratio=min(1.0, psutil.cpu_percent(interval=None) / 100),
                memory_used_bytes=memory.total - memory.available,
            )
        ]

    def free_bytes(self, device_id: str) -> int | None:
        """Returns the main memory that can be had without swapping."""
        return int(psutil.virtual_memory().available) if device_id == DEVICE_ID else None


def _product() -> str:
    """Returns the processor's own name; ARM machines often give none."""
    try:
        text = _CPUINFO.read_text(errors="replace")
    except OSError:
        return _UNKNOWN_PRODUCT
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if name.strip() in {"model name", "Hardware", "Model"} and value.strip():
            return " ".join(value.split())
    return _UNKNOWN_PRODUCT
