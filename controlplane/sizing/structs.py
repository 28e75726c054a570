"""The words of sizing: what is asked, what there is, what comes out."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from controlplane.sizing.facts import ModelFacts
from core.states import DeviceKind, Engine, Quantization


@dataclass(frozen=True, slots=True)
class SizingRequest:
    """What a replica is to be sized for.

    Attributes:
        engine: Program that serves the model.
        facts: What the model's configuration says; None for engines that run no model of their own.
        quantization: Asked-for quantization of the weights.
        max_model_len: Asked-for context, tokens; None to work it out.
        extra_args: Engine arguments; those that sizing knows override its own numbers.
    """

    engine: Engine
    facts: ModelFacts | None = None
    quantization: Quantization = Quantization.NONE
    max_model_len: int | None = None
    extra_args: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class DeviceOption:
    """Equal devices of one node that the engine can use.

    Attributes:
        kind: What they are.
        memory_bytes: Memory of one of them that engines may use.
        count: How many the node has.
        node: Where they are; for messages only.
        product: Vendor's name of it; for messages only.
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
