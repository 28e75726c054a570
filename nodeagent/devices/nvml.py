"""NVIDIA GPUs, read through NVML. Its absence is normal and means no such devices.

NVML is a C library with a global state: it is opened once, lazily, and every reading that a product
does not support stays unknown.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import structlog
from millrace.core.v1 import node_pb2, stats_pb2, types_pb2

_log = structlog.get_logger(__name__)
_T = TypeVar("_T")


def _load() -> Any | None:
    """Opens NVML; None where there is no driver or no GPU."""
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        _log.info("no NVIDIA GPUs", reason=str(error))
        return None
    return pynvml


class NvmlDevices:
    """The GPUs that NVML lists, by UUID."""

    def __init__(self, load: Callable[[], Any | None] = _load) -> None:
        """Takes how to open NVML, so that tests can bring their own."""
        self._nvml = load()

    def devices(self) -> Sequence[node_pb2.Device]:
        """Lists the GPUs; one that cannot be read is left out with a log line."""
        found: list[node_pb2.Device] = []
        for index in range(self._count()):
            device = self._device(index)
            if device is not None:
                found.append(device)
        return found

    def sample(self) -> Sequence[stats_pb2.DeviceStats]:
        """Reads use, memory, temperature and power."""
        return [self._sample(device.id) for device in self.devices()]

    def free_bytes(self, device_id: str) -> int | None:
        """Returns the GPU memory that no process holds."""
        if self._nvml is None:
            return None
        return self._read(lambda nvml: int(nvml.nvmlDeviceGetMemoryInfo(_handle(nvml, device_id)).free))

    def _count(self) -> int:
        return self._read(lambda nvml: int(nvml.nvmlDeviceGetCount())) or 0

    def _device(self, index: int) -> node_pb2.Device | None:
        def read(nvml: Any) -> node_pb2.Device:
            handle = nvml.nvmlDeviceGetHandleByIndex(index)
            return node_pb2.Device(
                id=_text(nvml.nvmlDeviceGetUUID(handle)),
                kind=types_pb2.DEVICE_KIND_NVIDIA,
                product=_text(nvml.nvmlDeviceGetName(handle)),
                memory_bytes=int(nvml.nvmlDeviceGetMemoryInfo(handle).total),
                index=index,
            )

        device = self._read(read)
        if device is None:
            _log.warning("a GPU cannot be read and is left out", index=index)
        return device

    def _sample(self, device_id: str) -> stats_pb2.DeviceStats:
        stats = stats_pb2.DeviceStats(device_id=device_id)
        readings: dict[str, Callable[[Any, Any], float]] = {
            "utilization_ratio": lambda nvml, handle: nvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100,
            "temperature_celsius": lambda nvml, handle: float(
                nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU)
            ),
            "power_watts": lambda nvml, handle: nvml.nvmlDeviceGetPowerUsage(handle) / 1000,
        }
        for field, reading in readings.items():
            value = self._read(partial(_read_handle, device_id, reading))
            if value is not None:
                setattr(stats, field, value)
        used = self._read(lambda nvml: int(nvml.nvmlDeviceGetMemoryInfo(_handle(nvml, device_id)).used))
        if used is not None:
            stats.memory_used_bytes = used
        return stats

    def _read(self, reading: Callable[[Any], _T]) -> _T | None:
        """Reads a value; None where NVML is absent or does not know it."""
        if self._nvml is None:
            return None
        try:
            return reading(self._nvml)
        except self._nvml.NVMLError as error:
            _log.debug("NVML has no such value", error=str(error))
            return None


def _read_handle(device_id: str, reading: Callable[[Any, Any], float], nvml: Any) -> float:
    return reading(nvml, _handle(nvml, device_id))


def _handle(nvml: Any, device_id: str) -> Any:
    return nvml.nvmlDeviceGetHandleByUUID(device_id)


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
