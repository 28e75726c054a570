"""Whether a model fits on given devices, and with which context and cache.

In come a model's facts, what was asked for and one set of equal devices; out comes a `Fit`, or None. Every
number that is assumed rather than computed stands at the top, with its reason. Pure.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from controlplane.sizing.facts import ModelFacts
from controlplane.sizing.overrides import Overrides
from controlplane.sizing.structs import DeviceOption
from controlplane.sizing.units import GIB, MIB
from core.states import DeviceKind, Quantization

# Measured on vLLM: about 3 GB resident for a model of a few MB on CPU; on a GPU activations, CUDA graphs
# and the context agree with published cache sizes within 0.4 % at 3.5 GiB.
OVERHEAD_BYTES = {DeviceKind.CPU: 3 * GIB, DeviceKind.NVIDIA: 7 * GIB // 2}
# A cache for so many sequences of full length keeps a batch going.
SEQUENCES = 8
KV_CACHE_MIN = 64 * MIB
# Main memory is shared with everything else on the machine; beyond this a CPU gains nothing.
KV_CACHE_MAX_CPU = 4 * GIB
# The engine's own default share of a GPU; the rest is the driver's.
GPU_UTILIZATION = 0.92
# Shorter contexts than this are not chosen without being asked for: hardly any prompt would fit.
CONTEXT_MIN = 2048
# The engine's largest default block; a sequence takes whole blocks, and one block is never handed out.
BLOCK_TOKENS = 128
# Head widths that the engine's CPU attention takes.
CPU_HEAD_DIMS = frozenset({32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512})
# Bits of an int4 weight with its scale and zero point, in groups of 128.
INT4_BITS_THOUSANDTHS = 4156

_SHORTENED_STEP = 1024


@dataclass(frozen=True, slots=True)
class Demand:
    """What is asked of any device.

    Attributes:
        facts: Of the model.
        quantization: Of the weights as they will be loaded.
        max_model_len: Asked-for context, tokens; None to take the longest.
        overrides: What the user set by hand.
    """

    facts: ModelFacts
    quantization: Quantization
    max_model_len: int | None
    overrides: Overrides


@dataclass(frozen=True, slots=True)
class Fit:
    """One way to run a model.

    Attributes:
        option: On which devices.
        tensor_parallel: How many of them.
        max_model_len: Context, tokens.
        shortened: True when the model could take a longer context.
        weights_bytes: Weights, over all devices.
        kv_bytes_per_token: Cache a token, over all devices.
        kv_cache_bytes: Cache, over all devices.
        overhead_bytes: What the engine needs besides, a device.
        kv_left_to_engine: True where the engine fills its share of the device by itself.
    """

    option: DeviceOption
    tensor_parallel: int
    max_model_len: int
    shortened: bool
    weights_bytes: int
    kv_bytes_per_token: int
    kv_cache_bytes: int
    overhead_bytes: int
    kv_left_to_engine: bool = False

    @property
    def total_bytes(self) -> int:
        """Need of one replica, over all devices."""
        return self.weights_bytes + self.kv_cache_bytes + self.overhead_bytes * self.tensor_parallel


def usable_bytes(option: DeviceOption, overrides: Overrides) -> int:
    """Memory of one device that an engine can use."""
    default = 1.0 if option.kind is DeviceKind.CPU else GPU_UTILIZATION
    return int(option.memory_bytes * (overrides.memory_utilization or default))


def weights_bytes(facts: ModelFacts, quantization: Quantization) -> tuple[int, str]:
    """Bytes of the loaded weights, and how they were worked out."""
    from_files = quantization is Quantization.NONE or facts.quantization is not Quantization.NONE
    if facts.weight_file_bytes is not None and from_files:
        return facts.weight_file_bytes, "sum of the weight files"
    linear = facts.parameters - facts.embedding_parameters
    count = f"{facts.parameters:,} parameters"
    match quantization:
        case Quantization.FP8:
            amount = linear + 2 * facts.embedding_parameters
            return amount, f"{count}: 1 byte each, embeddings 2"
        case Quantization.AWQ | Quantization.GPTQ:
            amount = linear * INT4_BITS_THOUSANDTHS // 8000 + 2 * facts.embedding_parameters
            return amount, f"{count}: 4.156 bits each with scales, embeddings 16"
        case _:
            # Decoders are loaded in 16 bits whatever the files hold; encoders keep their own precision.
            each = facts.dtype_bytes if facts.encoder_only else 2
            return facts.parameters * each, f"{count} x {each} bytes"


def kv_bytes_per_token(facts: ModelFacts, tensor_parallel: int, element_bytes: int) -> int:
    """Cache a token over all devices; heads are repeated where there are fewer of them than devices."""
    copies = tensor_parallel if facts.kv_replicated else max(1, tensor_parallel // facts.kv_heads)
    return facts.kv_elements_per_token * element_bytes * copies


def parallel_refusal(facts: ModelFacts, tensor_parallel: int, quantization: Quantization) -> str:
    """Why the weights cannot be split over so many devices; empty when they can."""
    if facts.attention_heads % tensor_parallel:
        return f"{facts.attention_heads} attention heads do not divide by {tensor_parallel}"
    if not facts.kv_replicated and facts.kv_heads % tensor_parallel and tensor_parallel % facts.kv_heads:
        return f"{facts.kv_heads} key/value heads and {tensor_parallel} devices do not divide"
    group = facts.quantization_group
    if not group and quantization in {Quantization.AWQ, Quantization.GPTQ}:
        group = 128
    for width in facts.feed_forward_widths:
        if width % tensor_parallel:
            return f"a feed-forward width of {width} does not divide by {tensor_parallel}"
        if tensor_parallel > 1 and group and (width // tensor_parallel) % group:
            return f"a feed-forward width of {width} over {tensor_parallel} breaks the groups of {group}"
    return ""


def parallel_degrees(demand: Demand, option: DeviceOption) -> Iterator[int]:
    """Tensor-parallel degrees that are possible on one node, smallest first."""
    # One CPU share a node: splitting a model over processors of one machine gains nothing.
    most = 1 if option.kind is DeviceKind.CPU else option.count
    asked = demand.overrides.tensor_parallel
    degrees = range(1, most + 1) if asked is None else range(asked, min(asked, most) + 1)
    return (each for each in degrees if not parallel_refusal(demand.facts, each, demand.quantization))


def fit(demand: Demand, option: DeviceOption, tensor_parallel: int) -> Fit | None:
    """Fits a model on `tensor_parallel` devices of an option; None when it does not fit."""
    facts, overrides = demand.facts, demand.overrides
    weights, _ = weights_bytes(facts, demand.quantization)
    overhead = OVERHEAD_BYTES[option.kind]
    budget = (usable_bytes(option, overrides) - overhead) * tensor_parallel - weights
    if budget < 0:
        return None
    per_token = kv_bytes_per_token(facts, tensor_parallel, overrides.kv_element_bytes)
    available = budget
    if overrides.kv_cache_bytes is not None:
        available = overrides.kv_cache_bytes * tensor_parallel
        if available > budget:
            return None
    context = _context(facts, demand.max_model_len, per_token, available)
    if context is None:
        return None
    by_utilization = overrides.memory_utilization is not None and overrides.kv_cache_bytes is None
    if overrides.kv_cache_bytes is not None or by_utilization:
        cache = available
    else:
        cache = _cache(option.kind, per_token, context, available)
    return Fit(
        option=option,
        tensor_parallel=tensor_parallel,
        max_model_len=context,
        shortened=demand.max_model_len is None and context < facts.max_positions,
        weights_bytes=weights,
        kv_bytes_per_token=per_token,
        kv_cache_bytes=cache,
        overhead_bytes=overhead,
        kv_left_to_engine=by_utilization,
    )


def sequence_bytes(per_token: int, context: int) -> int:
    """Cache that one sequence of full length needs, in whole blocks and one block more."""
    return per_token * (-(-context // BLOCK_TOKENS) + 1) * BLOCK_TOKENS


def _context(facts: ModelFacts, asked: int | None, per_token: int, available: int) -> int | None:
    if asked is not None:
        return asked if sequence_bytes(per_token, asked) <= available else None
    if sequence_bytes(per_token, facts.max_positions) <= available:
        return facts.max_positions
    longest = (available // (per_token * BLOCK_TOKENS) - 1) * BLOCK_TOKENS
    if longest > _SHORTENED_STEP:
        longest -= longest % _SHORTENED_STEP
    return longest if longest >= min(CONTEXT_MIN, facts.max_positions) else None


def _cache(kind: DeviceKind, per_token: int, context: int, available: int) -> int:
    if per_token == 0:
        return 0
    one = sequence_bytes(per_token, context)
    wanted = max(KV_CACHE_MIN, one, per_token * context * SEQUENCES)
    if kind is DeviceKind.CPU:
        wanted = min(wanted, max(KV_CACHE_MAX_CPU, one))
    return min(wanted, available)
