"""A fixed list of devices from a JSON file, for tests and for machines that describe themselves.

The file holds a list of `{"id", "kind", "product", "memory_bytes"}`, where `kind` is `cpu` or `nvidia`.
Nothing is measured: samples and free memory are unknown.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import pydantic
from millrace.core.v1 import node_pb2, stats_pb2, types_pb2

from core import errors

_KINDS = {"cpu": types_pb2.DEVICE_KIND_CPU, "nvidia": types_pb2.DEVICE_KIND_NVIDIA}


class _StaticDevice(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid")

    id: str = pydantic.Field(min_length=1, max_length=128)
    kind: Literal["cpu", "nvidia"]
    product: str = ""
    memory_bytes: int = pydantic.Field(gt=0)


_FILE = pydantic.TypeAdapter(list[_StaticDevice])


class StaticDevices:
    """Devices as a file lists them."""

    def __init__(self, path: Path) -> None:
        """Reads the file.

        Raises:
            InvalidArgument: The file cannot be read or is not of the right form.
        """
        try:
            listed = _FILE.validate_json(path.read_bytes())
        except OSError as error:
            raise errors.InvalidArgument.of("devices_file", f"{path}: {error.strerror}") from error
        except pydantic.ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise errors.InvalidArgument.of("devices_file", f"{path}: {where}: {first['msg']}") from error
        if len({device.id for device in listed}) != len(listed):
            raise errors.InvalidArgument.of("devices_file", f"{path}: two devices have the same id")
        self._devices = [
            node_pb2.Device(
                id=device.id,
                kind=_KINDS[device.kind],
                product=device.product,
                memory_bytes=device.memory_bytes,
                index=index,
            )
            for index, device in enumerate(listed)
        ]

    def devices(self) -> Sequence[node_pb2.Device]:
        """Lists the devices."""
        return self._devices

    def sample(self) -> Sequence[stats_pb2.DeviceStats]:
        """Nothing is measured."""
        return []

    def free_bytes(self, device_id: str) -> int | None:  # noqa: ARG002 - the protocol's signature
        """Nothing is measured."""
        return None
