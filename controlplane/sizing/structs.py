"""The words of sizing: what is asked, what there is, what comes out."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from controlplane.sizing.facts import ModelFacts
from controlplane.sizing.units import GIB
from core.states import DeviceKind, Engine, Quantization

# Measured on vLLM: about 3 GB resident for a model of a few MB on CPU; on a GPU activations, CUDA graphs
# and the context agree with published cache sizes within 0.4 % at 3.5 GiB.
OVERHEAD_BYTES = {DeviceKind.CPU: 3 * GIB, DeviceKind.NVIDIA: 7 * GIB // 2}
# The engine's own default share of a GPU; the rest is the driver's.
MEMORY_UTILIZATION = {DeviceKind.CPU: 1.0, DeviceKind.NVIDIA: 0.92}


@dataclass(frozen=True, slots=True)
class EngineFacts:
    """What an engine needs besides the model; the defaults are vLLM's.

    Attributes:
        overhead_bytes: Activations, graphs and the context, a device, by its kind; a kind that is not there
            cannot be used.
        memory_utilization: Share of a device that the engine takes by default, 0 to 1, by kind.
    """

    overhead_bytes: Mapping[DeviceKind, int] = field(default_factory=OVERHEAD_BYTES.copy)
    memory_utilization: Mapping[DeviceKind, float] = field(default_factory=MEMORY_UTILIZATION.copy)


@dataclass(frozen=True, slots=True)
class Calibration:
    """What an engine was measured to need for this model on one kind of device. None is not told.

    Attributes:
        product: Vendor's name of the device, as in `DeviceOption`.
        engine_version: Of the engine that was measured.
        tensor_parallel: Devices that shared the weights.
        max_model_len: Context of that run, tokens.
        weights_bytes: Loaded weights, over all devices.
        besides_cache_bytes: Everything but the cache, over all devices.
        kv_cache_bytes: Cache, over all devices.
        kv_cache_tokens: Tokens that it held.
    """

    product: str
    engine_version: str
    tensor_parallel: int
    max_model_len: int
    weights_bytes: int | None = None
    besides_cache_bytes: int | None = None
    kv_cache_bytes: int | None = None
    kv_cache_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class GpuModel:
    """A kind of GPU.

    Attributes:
        name: Short name, such as A100-80GB.
        products: Exact product strings of its driver.
        aliases: Other short names.
        memory_bytes: Total that the driver reports; less than the name says.
        compute_capability: Of its instruction set.
        bfloat16: True where it computes in bfloat16.
        native_fp8: True where it computes in fp8; elsewhere fp8 weights are unpacked first.
        devices_per_node: The most that one machine usually has.
        tier: Recommended from the lowest tier that fits, where nobody says what there is.
        cost_rank: Order by price, cheapest first.
    """

    name: str
    products: tuple[str, ...]
    aliases: tuple[str, ...]
    memory_bytes: int
    compute_capability: float
    bfloat16: bool
    native_fp8: bool
    devices_per_node: int
    tier: int
    cost_rank: int

    @property
    def short_name(self) -> str:
        """As sentences write it: A100-80."""
        return self.name.removesuffix("GB")


@dataclass(frozen=True, slots=True)
class SizingRequest:
    """What a replica is to be sized for.

    Attributes:
        engine: Program that serves the model.
        facts: What the model's configuration says; None for engines that run no model of their own.
        quantization: Asked-for quantization of the weights.
        max_model_len: Asked-for context, tokens; None to work it out.
        extra_args: Engine arguments; those that sizing knows override its own numbers.
        engine_facts: What the engine needs besides the model.
        calibrations: What was measured of earlier starts, at most one for a product.
    """

    engine: Engine
    facts: ModelFacts | None = None
    quantization: Quantization = Quantization.NONE
    max_model_len: int | None = None
    extra_args: Mapping[str, object] = field(default_factory=dict)
    engine_facts: EngineFacts = field(default_factory=EngineFacts)
    calibrations: tuple[Calibration, ...] = ()


@dataclass(frozen=True, slots=True)
class DeviceOption:
    """Equal devices of one node that the engine can use.

    Attributes:
        kind: What they are.
        memory_bytes: Memory of one of them that engines may use.
        count: How many the node has.
        node: Where they are; for messages only.
        product: Vendor's name of it; for messages, and for the engine's defaults that go by it.
    """

    kind: DeviceKind
    memory_bytes: int
    count: int = 1
    node: str = ""
    product: str = ""


@dataclass(frozen=True, slots=True)
class SizingTerm:
    """One addend of a sizing: what for, how many bytes, and how they were worked out."""

    name: str
    bytes: int
    explanation: str


@dataclass(frozen=True, slots=True)
class SizingResult:
    """What one replica needs; the fields mirror `millrace.core.v1.Sizing`."""

    parameters: int = 0
    weights_bytes: int = 0
    kv_bytes_per_token: int = 0
    kv_cache_bytes: int = 0
    kv_cache_tokens: int = 0
    overhead_bytes: int = 0
    total_bytes: int = 0
    device_count: int = 0
    tensor_parallel: int = 0
    max_model_len: int = 0
    device_kinds: tuple[DeviceKind, ...] = ()
    terms: tuple[SizingTerm, ...] = ()
    summary: str = ""


@dataclass(frozen=True, slots=True)
class DoesNotFit:
    """Why no known device can ever hold the model.

    Attributes:
        needed_bytes: What the most modest possible start needs.
        largest_bytes: The largest memory that one node offers to one replica.
        message: One sentence with the numbers.
        suggestion: The cheapest change that would fit; empty where none is known.
    """

    needed_bytes: int
    largest_bytes: int
    message: str
    suggestion: str
