"""Devices: CPU share, a fixed list, NVML with and without a driver."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from millrace.core.v1 import types_pb2

from core import errors
from nodeagent.devices.cpu import CpuDevices
from nodeagent.devices.nvml import NvmlDevices
from nodeagent.devices.static import StaticDevices


def test_cpu_share() -> None:
    source = CpuDevices(0.5)
    (device,) = source.devices()
    assert device.id == "cpu"
    assert device.memory_bytes == psutil.virtual_memory().total // 2
    assert device.product
    (sample,) = source.sample()
    assert 0 <= sample.utilization_ratio <= 1
    assert sample.memory_used_bytes > 0
    assert (source.free_bytes("cpu") or 0) > 0
    assert source.free_bytes("other") is None


def test_static_list(tmp_path: Path) -> None:
    path = tmp_path / "devices.json"
    path.write_text(json.dumps([{"id": "GPU-0", "kind": "nvidia", "product": "X", "memory_bytes": 5}]))
    source = StaticDevices(path)
    (device,) = source.devices()
    assert (device.id, device.kind, device.product, device.memory_bytes) == (
        "GPU-0",
        types_pb2.DEVICE_KIND_NVIDIA,
        "X",
        5,
    )
    assert source.free_bytes("GPU-0") is None
    assert not source.sample()


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("{", "JSON"),
        ("[{}]", "0.id"),
        ('[{"id": "a", "kind": "tpu", "memory_bytes": 1}]', "0.kind"),
        ('[{"id": "a", "kind": "cpu", "memory_bytes": 0}]', "0.memory_bytes"),
        ('[{"id": "a", "kind": "cpu", "memory_bytes": 1, "extra": 1}]', "0.extra"),
        (
            '[{"id": "a", "kind": "cpu", "memory_bytes": 1}, {"id": "a", "kind": "cpu", "memory_bytes": 1}]',
            "same",
        ),
    ],
)
def test_static_list_names_what_is_wrong(tmp_path: Path, text: str, part: str) -> None:
    path = tmp_path / "devices.json"
    path.write_text(text)
    with pytest.raises(errors.InvalidArgument, match="devices_file") as caught:
        StaticDevices(path)
    assert part in caught.value.message


def test_static_list_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(errors.InvalidArgument, match="No such file"):
        StaticDevices(tmp_path / "none.json")


class FakeNvml:
    """One GPU that knows neither its power nor, when broken, anything else."""

    NVMLError = RuntimeError
    NVML_TEMPERATURE_GPU = 0
    broken = False

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802 - NVML's name
        return 1

    def nvmlDeviceGetHandleByIndex(self, index: int) -> str:  # noqa: N802 - NVML's name
        if self.broken:
            raise RuntimeError("fell off the bus")
        return "handle"

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:  # noqa: N802 - NVML's name
        return "handle"

    def nvmlDeviceGetUUID(self, handle: str) -> bytes:  # noqa: N802 - NVML's name
        return b"GPU-1"

    def nvmlDeviceGetName(self, handle: str) -> str:  # noqa: N802 - NVML's name
        return "NVIDIA X"

    def nvmlDeviceGetMemoryInfo(self, handle: str) -> Any:  # noqa: N802 - NVML's name
        return SimpleNamespace(total=100, used=40, free=60)

    def nvmlDeviceGetUtilizationRates(self, handle: str) -> Any:  # noqa: N802 - NVML's name
        return SimpleNamespace(gpu=50)

    def nvmlDeviceGetTemperature(self, handle: str, kind: int) -> int:  # noqa: N802 - NVML's name
        return 41

    def nvmlDeviceGetPowerUsage(self, handle: str) -> int:  # noqa: N802 - NVML's name
        raise RuntimeError("not supported")


def test_nvml() -> None:
    source = NvmlDevices(load=FakeNvml)
    (device,) = source.devices()
    assert (device.id, device.product, device.memory_bytes) == ("GPU-1", "NVIDIA X", 100)
    (sample,) = source.sample()
    assert (sample.utilization_ratio, sample.temperature_celsius, sample.memory_used_bytes) == (0.5, 41.0, 40)
    assert not sample.HasField("power_watts")
    assert source.free_bytes("GPU-1") == 60


def test_gpu_that_cannot_be_read_is_left_out() -> None:
    nvml = FakeNvml()
    nvml.broken = True
    assert not NvmlDevices(load=lambda: nvml).devices()


def test_no_nvml_is_no_devices() -> None:
    source = NvmlDevices(load=lambda: None)
    assert not source.devices()
    assert not source.sample()
    assert source.free_bytes("GPU-1") is None
