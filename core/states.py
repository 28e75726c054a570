"""The states that pure code reasons about, as plain integers without protobuf.

The values equal those of `millrace.core.v1` (a unit test holds them together). Nothing here imports
generated code, so that the scheduler and sizing can use it.
"""

from enum import IntEnum


class ReplicaState(IntEnum):
    """Life of a replica: only moves forward, the larger value wins."""

    PENDING = 32
    ASSIGNED = 64
    PREPARING = 128
    STARTING = 192
    READY = 256
    DRAINING = 320
    STOPPED = 384
    FAILED = 448
    LOST = 512
    PREEMPTED = 576

    @property
    def terminal(self) -> bool:
        """True once the replica can only be replaced."""
        return self >= ReplicaState.STOPPED


class NodeState(IntEnum):
    """What the control plane believes of a machine."""

    UNSPECIFIED = 0
    READY = 1
    SILENT = 2
    LOST = 3


class Engine(IntEnum):
    """Programs that serve a model."""

    UNSPECIFIED = 0
    VLLM = 1
    TGI = 2
    SGLANG = 3
    OLLAMA = 4
    LLAMACPP = 5
    XLLM = 6
    VLLM_ASCEND = 7
    EXTERNAL = 8
    SIMULATOR = 9


class Quantization(IntEnum):
    """Quantization of a model's weights."""

    UNSPECIFIED = 0
    NONE = 1
    AWQ = 2
    GPTQ = 3
    FP8 = 4


class DeviceKind(IntEnum):
    """What a device is."""

    UNSPECIFIED = 0
    CPU = 1
    NVIDIA = 2


class TaintEffect(IntEnum):
    """What a taint does to replicas that do not tolerate it."""

    UNSPECIFIED = 0
    NO_SCHEDULE = 1
    NO_EXECUTE = 2
