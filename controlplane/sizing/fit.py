"""Whether a model fits on given devices, and with which context and cache.

In come a model's facts, what was asked for and one set of equal devices; out comes a `Fit`, or None. Every
number that is assumed rather than computed stands at the top, with its reason. Pure.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from controlplane.sizing.calibration import cache_scale, calibrated_overhead, calibrated_weights
from controlplane.sizing.facts import ModelFacts
from controlplane.sizing.overrides import Overrides
from controlplane.sizing.structs import Calibration, DeviceOption, EngineFacts
from controlplane.sizing.units import GIB, MIB, format_bytes
from core.states import DeviceKind, Quantization

# A cache for so many sequences of full length keeps a batch going.
SEQUENCES = 8
KV_CACHE_MIN = 64 * MIB
# Main memory is shared with everything else on the machine; beyond this a CPU gains nothing.
KV_CACHE_MAX_CPU = 4 * GIB
# Shorter contexts than this are not chosen without being asked for: hardly any prompt would fit.
CONTEXT_MIN = 2048
# The engine's largest default block; a sequence takes whole blocks, and one block is never handed out.
BLOCK_TOKENS = 128
BLOCK_TOKENS_GPU = 16
# States that a linear-attention layer keeps of a sequence: the current one, and the one before it, from which
# the prefix cache can go on.
STATE_PAGES = 2
# Head widths that the engine's CPU attention takes.
CPU_HEAD_DIMS = frozenset({32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512})
# One 32-bit scale for a block of 128 x 128 weights.
FP8_BLOCK = 128 * 128
INT4_GROUP = 128
# Tokens in one step, the engine's defaults for a server by the memory of the device; it makes an exception
# for the A100. They bound what a sliding-window layer holds beyond its window.
_BATCH_TOKENS = ((160 * GIB, 16384), (70 * GIB, 8192), (0, 2048))

_SHORTENED_STEP = 1024


@dataclass(frozen=True, slots=True)
class Demand:
    """What is asked of any device.

    Attributes:
        facts: Of the model.
        quantization: Of the weights as they will be loaded.
        max_model_len: Asked-for context, tokens; None to take the longest.
        overrides: What the user set by hand.
        engine: What the engine needs besides the model.
        calibrations: What was measured of earlier starts, at most one for a product.
    """

    facts: ModelFacts
    quantization: Quantization
    max_model_len: int | None
    overrides: Overrides
    engine: EngineFacts
    calibrations: tuple[Calibration, ...] = ()

    def measured(self, option: DeviceOption) -> Calibration | None:
        """What was measured on such devices; None where nothing was."""
        return next((each for each in self.calibrations if each.product == option.product), None)


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
        usable_bytes: What the engine can use, over all devices.
        sequence_bytes: Cache of one sequence of full length, over all devices.
        kv_tokens: Tokens that the cache holds when it takes all that is left; 0 where there is none.
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
    usable_bytes: int
    sequence_bytes: int
    kv_tokens: int
    kv_left_to_engine: bool = False

    @property
    def total_bytes(self) -> int:
        """Need of one replica, over all devices."""
        return self.weights_bytes + self.kv_cache_bytes + self.overhead_bytes * self.tensor_parallel


def usable_bytes(option: DeviceOption, demand: Demand) -> int:
    """Memory of one device that an engine can use."""
    share = demand.overrides.memory_utilization or demand.engine.memory_utilization.get(option.kind, 1.0)
    return int(option.memory_bytes * share)


def overhead_bytes(option: DeviceOption, demand: Demand) -> int:
    """What the engine needs on one device besides weights and cache."""
    if demand.overrides.overhead_bytes is not None:
        return demand.overrides.overhead_bytes
    computed = demand.engine.overhead_bytes.get(option.kind, 0)
    weights, _ = weights_bytes(demand, option)
    measured = calibrated_overhead(computed, weights, demand.measured(option), option)
    return computed if measured is None else measured


def weights_bytes(demand: Demand, option: DeviceOption | None = None) -> tuple[int, str]:
    """Bytes of the loaded weights, and how they were worked out; measured ones where `option` has them."""
    if demand.overrides.weights_bytes is not None:
        return demand.overrides.weights_bytes, "set by hand"
    computed, how = _computed_weights(demand)
    measured = demand.measured(option) if option is not None else None
    amount = calibrated_weights(computed, measured)
    if amount is None or measured is None:
        return computed, how
    return amount, f"measured on vLLM {measured.engine_version} (worked out: {format_bytes(computed)})"


def _computed_weights(demand: Demand) -> tuple[int, str]:
    facts, quantization = demand.facts, demand.quantization
    from_files = quantization is Quantization.NONE or facts.quantization is not Quantization.NONE
    if facts.weight_file_bytes is not None and from_files:
        return facts.weight_file_bytes, "sum of the weight files"
    linear = facts.parameters - facts.embedding_parameters
    count = f"{facts.parameters:,} parameters"
    match quantization:
        case Quantization.FP8:
            amount = linear * (FP8_BLOCK + 4) // FP8_BLOCK + 2 * facts.embedding_parameters
            return amount, f"{count}: 1 byte each with scales, embeddings 2"
        case Quantization.AWQ | Quantization.GPTQ:
            group, bits = facts.quantization_group or INT4_GROUP, facts.quantization_bits
            # A 16-bit scale and a zero point of the weights' own width for each group.
            group_bits = bits * (group + 1) + 16
            amount = linear * group_bits // (8 * group) + 2 * facts.embedding_parameters
            return amount, f"{count}: {group_bits / group:.3f} bits each with scales, embeddings 16"
        case _:
            # Decoders are loaded in 16 bits whatever the files hold; encoders keep their own precision.
            each = facts.dtype_bytes if facts.encoder_only else 2
            return facts.parameters * each, f"{count} x {each} bytes"


def kv_bytes_per_token(facts: ModelFacts, tensor_parallel: int, element_bytes: int) -> int:
    """Cache a token over all devices; heads are repeated where there are fewer of them than devices."""
    return facts.kv_elements_per_token * element_bytes * _copies(facts, tensor_parallel)


def _copies(facts: ModelFacts, tensor_parallel: int) -> int:
    return tensor_parallel if facts.kv_replicated else max(1, tensor_parallel // facts.kv_heads)


def sequence_bytes(demand: Demand, option: DeviceOption, tensor_parallel: int, tokens: int) -> int:
    """Cache of one sequence over all devices: windows capped, states of constant size added.

    Corrected by what was measured on such devices.
    """
    computed = _computed_sequence_bytes(demand, option, tensor_parallel, tokens)
    measured = demand.measured(option)
    if measured is None:
        return computed
    like = _computed_sequence_bytes(demand, option, measured.tensor_parallel, measured.max_model_len)
    return round(computed * cache_scale(like, measured))


def _computed_sequence_bytes(demand: Demand, option: DeviceOption, tensor_parallel: int, tokens: int) -> int:
    facts, element_bytes = demand.facts, demand.overrides.kv_element_bytes
    windowed = facts.window_elements_per_token * element_bytes
    full = facts.kv_elements_per_token * element_bytes - windowed
    held = _held_tokens(demand, option, tokens) if windowed else 0
    states = state_bytes_per_sequence(demand, option) if tokens else 0
    return (full * tokens + windowed * held) * _copies(facts, tensor_parallel) + states


def state_bytes_per_sequence(demand: Demand, option: DeviceOption) -> int:
    """What linear-attention layers keep of a sequence: whole pages, as large as those of attention."""
    facts = demand.facts
    token_bytes = 2 * facts.kv_heads * facts.head_dim * demand.overrides.kv_element_bytes
    if not facts.state_layers or not token_bytes:
        return facts.state_layers * STATE_PAGES * facts.state_bytes
    # The engine makes a block so long that one layer's keys and values of it take up a state.
    block = _block_tokens(option)
    page = -(-facts.state_bytes // (token_bytes * block)) * token_bytes * block
    return facts.state_layers * STATE_PAGES * page


def _block_tokens(option: DeviceOption) -> int:
    return BLOCK_TOKENS if option.kind is DeviceKind.CPU else BLOCK_TOKENS_GPU


def _held_tokens(demand: Demand, option: DeviceOption, tokens: int) -> int:
    """Tokens that a windowed layer holds: the window and a step's, in whole blocks and one block more."""
    block = _block_tokens(option)
    held = min(tokens, demand.facts.window_tokens - 1 + _batch_tokens(demand, option))
    return (-(-held // block) + 1) * block if held else 0


def _batch_tokens(demand: Demand, option: DeviceOption) -> int:
    if demand.overrides.batch_tokens is not None:
        return demand.overrides.batch_tokens
    small = option.kind is DeviceKind.CPU or "A100" in option.product
    memory_bytes = 0 if small else option.memory_bytes
    return next(tokens for least, tokens in _BATCH_TOKENS if memory_bytes >= least)


def parallel_refusal(facts: ModelFacts, tensor_parallel: int, quantization: Quantization) -> str:
    """Why the weights cannot be split over so many devices; empty when they can."""
    if facts.attention_heads % tensor_parallel:
        return f"{facts.attention_heads} attention heads do not divide by {tensor_parallel}"
    if not facts.kv_replicated and facts.kv_heads % tensor_parallel and tensor_parallel % facts.kv_heads:
        return f"{facts.kv_heads} key/value heads and {tensor_parallel} devices do not divide"
    group = facts.quantization_group
    if not group and quantization in {Quantization.AWQ, Quantization.GPTQ}:
        group = INT4_GROUP
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
    weights, _ = weights_bytes(demand, option)
    overhead = overhead_bytes(option, demand)
    usable = usable_bytes(option, demand) * tensor_parallel
    budget = usable - overhead * tensor_parallel - weights
    if budget < 0:
        return None
    available = budget
    if overrides.kv_cache_bytes is not None:
        available = overrides.kv_cache_bytes * tensor_parallel
        if available > budget:
            return None
    context = _context(demand, option, tensor_parallel, available)
    if context is None:
        return None
    one = sequence_bytes(demand, option, tensor_parallel, context)
    by_utilization = overrides.memory_utilization is not None and overrides.kv_cache_bytes is None
    if overrides.kv_cache_bytes is not None or by_utilization:
        cache = available
    else:
        cache = _cache(option.kind, one, least_bytes(demand, option, tensor_parallel, context), available)
    return Fit(
        option=option,
        tensor_parallel=tensor_parallel,
        max_model_len=context,
        shortened=demand.max_model_len is None and context < facts.max_positions,
        weights_bytes=weights,
        kv_bytes_per_token=kv_bytes_per_token(facts, tensor_parallel, overrides.kv_element_bytes),
        kv_cache_bytes=cache,
        overhead_bytes=overhead,
        usable_bytes=usable,
        sequence_bytes=one,
        kv_tokens=available * context // one if one else 0,
        kv_left_to_engine=by_utilization,
    )


def least_bytes(demand: Demand, option: DeviceOption, tensor_parallel: int, context: int) -> int:
    """Cache without which the engine refuses a context: one sequence in whole blocks, and a block more."""
    if demand.facts.encoder_only:
        return 0
    blocks = (-(-context // BLOCK_TOKENS) + 1) * BLOCK_TOKENS
    return sequence_bytes(demand, option, tensor_parallel, blocks)


def _context(demand: Demand, option: DeviceOption, tensor_parallel: int, available: int) -> int | None:
    """The context that was asked for, or the longest that the cache holds; None when there is none."""

    def holds(tokens: int) -> bool:
        return least_bytes(demand, option, tensor_parallel, tokens) <= available

    if demand.max_model_len is not None:
        return demand.max_model_len if holds(demand.max_model_len) else None
    most = demand.facts.max_positions
    if holds(most):
        return most
    low, high = 0, most // BLOCK_TOKENS
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if holds(middle * BLOCK_TOKENS) else (low, middle - 1)
    longest = low * BLOCK_TOKENS
    if longest > _SHORTENED_STEP:
        longest -= longest % _SHORTENED_STEP
    return longest if longest >= min(CONTEXT_MIN, most) else None


def _cache(kind: DeviceKind, one: int, least: int, available: int) -> int:
    if one == 0:
        return 0
    wanted = max(KV_CACHE_MIN, least, one * SEQUENCES)
    if kind is DeviceKind.CPU:
        wanted = min(wanted, max(KV_CACHE_MAX_CPU, least))
    return min(wanted, available)
