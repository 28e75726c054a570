"""What one replica needs, from a model's facts and the devices there are.

In come a `SizingRequest` and the devices that the engine can use, out comes a `SizingResult` whose terms
add up, or a refusal with the numbers and the cheapest change. Where the facts come from, the knowledge base
or a model's own files, makes no difference here. Pure.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from controlplane.sizing.fit import (
    CONTEXT_MIN,
    CPU_HEAD_DIMS,
    SEQUENCES,
    Demand,
    Fit,
    fit,
    least_bytes,
    overhead_bytes,
    parallel_degrees,
    parallel_refusal,
    usable_bytes,
    weights_bytes,
)
from controlplane.sizing.overrides import check_tokens, read_overrides
from controlplane.sizing.sentences import devices_text, fit_sentence
from controlplane.sizing.structs import DeviceOption, DoesNotFit, SizingRequest, SizingResult, SizingTerm
from controlplane.sizing.units import MIB, format_bytes
from core.errors import FailedPrecondition, InvalidArgument
from core.states import DeviceKind, Engine, Quantization

DOES_NOT_FIT = "ERROR_REASON_MODEL_DOES_NOT_FIT"
SIMULATOR_BYTES = 64 * MIB
SIMULATOR_MAX_MODEL_LEN = 8192
# A context below this is taken only where more devices do not give a longer one: most prompts with a
# document or a few turns would not fit.
CONTEXT_USEFUL = 8192

_KIND_NAMES = {DeviceKind.CPU: "CPU", DeviceKind.NVIDIA: "NVIDIA GPU"}
# Best first.
_KIND_ORDER = (DeviceKind.NVIDIA, DeviceKind.CPU)
# Stands for "not known yet": no device has been seen, so nothing can be refused for its size.
_UNBOUNDED = DeviceOption(DeviceKind.NVIDIA, memory_bytes=1 << 60, count=64)


def size(request: SizingRequest, devices: Sequence[DeviceOption]) -> SizingResult:
    """Sizes one replica.

    Args:
        request: Engine, model and what was asked for.
        devices: Devices on which the engine can run, grouped by node. None at all means that none is
            known yet: the result then holds for any kind, and nothing is refused for its size.

    Raises:
        InvalidArgument: `engine` is not supported; `max_model_len`, `quantization`, `model` or an
            `extra_args.<name>` is wrong.
        FailedPrecondition: No device, and no set of devices of one node, can ever hold the model; reason
            ERROR_REASON_MODEL_DOES_NOT_FIT.
    """
    match request.engine:
        case Engine.EXTERNAL:
            tokens = _asked_tokens(request) or 0
            return SizingResult(max_model_len=tokens, summary="someone else runs it: no device is needed")
        case Engine.SIMULATOR:
            return _simulator(request)
        case Engine.VLLM:
            pass
        case _:
            raise InvalidArgument.of(
                "engine",
                f"{request.engine.name.lower()} is not supported yet; use vllm, simulator or external",
            )
    demand = checked_demand(request, devices)
    if not devices:
        return _result(demand, _unbounded(demand), kinds=_possible_kinds(demand))
    best = _best(demand, devices)
    if best is None:
        refusal = _refusal(demand, devices)
        raise FailedPrecondition(
            refusal.message + (f"; {refusal.suggestion}" if refusal.suggestion else ""),
            reason=DOES_NOT_FIT,
            metadata={
                "field": "model",
                "needed_bytes": str(refusal.needed_bytes),
                "largest_bytes": str(refusal.largest_bytes),
            },
        )
    return _result(demand, best, kinds=(best.option.kind,))


def too_large(request: SizingRequest, devices: Sequence[DeviceOption]) -> DoesNotFit | None:
    """Tells why no given device can ever hold the model; None when one can.

    Raises:
        InvalidArgument: As `size`.
    """
    if request.engine is not Engine.VLLM or not devices:
        return None
    demand = checked_demand(request, devices)
    return None if _best(demand, devices) is not None else _refusal(demand, devices)


def _simulator(request: SizingRequest) -> SizingResult:
    tokens = _asked_tokens(request) or SIMULATOR_MAX_MODEL_LEN
    term = SizingTerm("overhead", SIMULATOR_BYTES, "the simulator's own process; it loads no model")
    return SizingResult(
        overhead_bytes=SIMULATOR_BYTES,
        total_bytes=SIMULATOR_BYTES,
        device_count=1,
        tensor_parallel=1,
        max_model_len=tokens,
        device_kinds=(DeviceKind.CPU,),
        terms=(term,),
        summary=f"overhead {format_bytes(SIMULATOR_BYTES)} on CPU: the simulator loads no model",
    )


def _asked_tokens(request: SizingRequest) -> int | None:
    """The context that was asked for; engine arguments win over the field."""
    override = read_overrides(request.extra_args).max_model_len
    if request.max_model_len is not None:
        check_tokens("max_model_len", request.max_model_len)
    return override if override is not None else request.max_model_len


def checked_demand(request: SizingRequest, devices: Sequence[DeviceOption]) -> Demand:
    """Checks what was asked for against the model.

    Raises:
        InvalidArgument: As `size`.
    """
    facts = request.facts
    if facts is None:
        raise InvalidArgument.of("model", "sizing for vllm needs the model's config.json")
    overrides = read_overrides(request.extra_args)
    tokens = _asked_tokens(request)
    if tokens is not None and tokens > facts.max_positions:
        field = "max_model_len" if overrides.max_model_len is None else "extra_args.max_model_len"
        raise InvalidArgument.of(
            field, f"{tokens} tokens is more than the model takes (at most {facts.max_positions})"
        )
    asked, stored = request.quantization, facts.quantization
    if asked is Quantization.UNSPECIFIED:
        asked = Quantization.NONE
    if Quantization.NONE not in {asked, stored} and asked is not stored:
        raise InvalidArgument.of(
            "quantization",
            f"the model's files are {stored.name} and cannot be loaded as {asked.name}; leave it out",
        )
    quantization = stored if stored is not Quantization.NONE else asked
    degree = overrides.tensor_parallel
    if degree is not None and (why := parallel_refusal(facts, degree, quantization)):
        valid = [str(each) for each in range(1, 17) if not parallel_refusal(facts, each, quantization)]
        raise InvalidArgument.of("extra_args.tensor_parallel_size", f"{why}; possible are {', '.join(valid)}")
    if devices and all(each.kind is DeviceKind.CPU for each in devices) and not _cpu_capable(facts.head_dim):
        raise InvalidArgument.of(
            "model",
            f"attention heads of width {facts.head_dim} cannot run on CPU (possible are "
            f"{', '.join(map(str, sorted(CPU_HEAD_DIMS)))}); add a node with a GPU or choose another model",
        )
    return Demand(
        facts=facts,
        quantization=quantization,
        max_model_len=tokens,
        overrides=overrides,
        engine=request.engine_facts,
        calibrations=request.calibrations,
    )


def _cpu_capable(head_dim: int) -> bool:
    return head_dim in CPU_HEAD_DIMS


def _possible_kinds(demand: Demand) -> tuple[DeviceKind, ...]:
    single = demand.overrides.tensor_parallel in {None, 1}
    cpu = single and _cpu_capable(demand.facts.head_dim)
    return _KIND_ORDER if cpu else (DeviceKind.NVIDIA,)


def _fits(demand: Demand, devices: Sequence[DeviceOption]) -> Iterator[Fit]:
    for option in devices:
        if option.kind is DeviceKind.CPU and not _cpu_capable(demand.facts.head_dim):
            continue
        if option.kind not in demand.engine.overhead_bytes:
            continue
        for degree in parallel_degrees(demand, option):
            found = fit(demand, option, degree)
            if found is not None:
                yield found
                if not too_short(found):
                    break


def too_short(found: Fit) -> bool:
    """True where the context was shortened to less than most callers need."""
    return found.shortened and found.max_model_len < CONTEXT_USEFUL


def _best(demand: Demand, devices: Sequence[DeviceOption]) -> Fit | None:
    """GPU before CPU, a useful context, the fewest devices, the smallest device, the longest context."""
    return min(
        _fits(demand, devices),
        key=lambda each: (
            _KIND_ORDER.index(each.option.kind),
            too_short(each),
            each.tensor_parallel,
            each.option.memory_bytes,
            -each.max_model_len,
            each.option.node,
        ),
        default=None,
    )


def _unbounded(demand: Demand) -> Fit:
    found = fit(demand, _UNBOUNDED, demand.overrides.tensor_parallel or 1)
    # The engine's share of an unknown device says nothing about its size: the cache is the default one.
    if found is None or found.kv_left_to_engine:
        relaxed = replace(demand.overrides, memory_utilization=None)
        found = fit(replace(demand, overrides=relaxed), _UNBOUNDED, demand.overrides.tensor_parallel or 1)
    assert found is not None, "an exbibyte holds every model that passes the checks"
    return found


def _refusal(demand: Demand, devices: Sequence[DeviceOption]) -> DoesNotFit:
    """Says what is needed, what there is, and the cheapest change."""
    weights = min(weights_bytes(demand, each)[0] for each in devices)
    tokens = demand.max_model_len or min(CONTEXT_MIN, demand.facts.max_positions)
    usable = [each for each in devices if each.kind in demand.engine.overhead_bytes] or list(devices)

    def offer(option: DeviceOption) -> int:
        return usable_bytes(option, demand) * max(parallel_degrees(demand, option), default=1)

    largest = max(usable, key=lambda each: (offer(each), each.memory_bytes))
    degree = max(parallel_degrees(demand, largest), default=1)
    overhead = overhead_bytes(largest, demand) * degree
    cache = least_bytes(demand, largest, degree, tokens)
    if demand.overrides.kv_cache_bytes is not None:
        cache = max(cache, demand.overrides.kv_cache_bytes * degree)
    needed = weights + cache + overhead
    where = _devices_text(largest.kind, degree)
    product = f" ({largest.product})" if largest.product else ""
    portion = offer(largest) / (largest.memory_bytes * degree)
    share = f", of which an engine can use {portion:.0%}" if largest.kind is DeviceKind.NVIDIA else ""
    message = (
        f"the model does not fit: weights {format_bytes(weights)} + KV cache {format_bytes(cache)} "
        f"(one sequence of {tokens} tokens) + overhead {format_bytes(overhead)} = {format_bytes(needed)} "
        f"needed, and the largest node offers {format_bytes(largest.memory_bytes * degree)} "
        f"on {where}{product}{share}"
    )
    return DoesNotFit(
        needed_bytes=needed,
        largest_bytes=offer(largest),
        message=message,
        suggestion=_suggestion(demand, devices, needed),
    )


def _suggestion(demand: Demand, devices: Sequence[DeviceOption], needed: int) -> str:
    if demand.max_model_len is not None:
        shorter = _best(replace(demand, max_model_len=None), devices)
        if shorter is not None:
            return f"max_model_len {min(shorter.max_model_len, demand.max_model_len)} fits"
    if demand.quantization is Quantization.NONE and any(each.kind is DeviceKind.NVIDIA for each in devices):
        for quantization in (Quantization.FP8, Quantization.AWQ):
            smaller = _best(replace(demand, quantization=quantization), devices)
            if smaller is not None:
                return (
                    f"quantization {quantization.name.lower()} fits "
                    f"({format_bytes(smaller.total_bytes)} on "
                    f"{_devices_text(smaller.option.kind, smaller.tensor_parallel)})"
                )
    alone = _alone_text(demand, devices, needed)
    return (
        f"add a node whose devices offer at least {format_bytes(needed)}{alone}, or choose a smaller model; "
        "`millrace size MODEL` lists the GPUs and quantizations that fit"
    )


def _alone_text(demand: Demand, devices: Sequence[DeviceOption], needed: int) -> str:
    """Why several nodes do not help, where somebody could think that they do; empty otherwise."""
    for kind in demand.engine.overhead_bytes:
        nodes = {each.node for each in devices if each.kind is kind and each.node}
        together = sum(usable_bytes(each, demand) * each.count for each in devices if each.kind is kind)
        if len(nodes) > 1 and together >= needed:
            return (
                f" (the {len(nodes)} nodes have the memory only together, and one replica takes the devices "
                "of one node)"
            )
    return ""


def _devices_text(kind: DeviceKind, count: int) -> str:
    name = _KIND_NAMES.get(kind, kind.name)
    return name if kind is DeviceKind.CPU else f"{count} {name}{'s' if count > 1 else ''}"


def _result(demand: Demand, found: Fit, *, kinds: tuple[DeviceKind, ...]) -> SizingResult:
    facts = demand.facts
    _, weights_text = weights_bytes(demand, found.option)
    cache_text = _cache_text(found)
    overhead = found.overhead_bytes * found.tensor_parallel
    overhead_text = (
        f"{format_bytes(found.overhead_bytes)} x {found.tensor_parallel} device(s): the engine's own"
        + _overhead_note(demand, found)
    )
    terms = (
        SizingTerm("weights", found.weights_bytes, weights_text),
        SizingTerm("kv_cache", found.kv_cache_bytes, cache_text),
        SizingTerm("overhead", overhead, overhead_text),
    )
    if found.option.product:
        summary = fit_sentence(
            found,
            cache=found.kv_cache_bytes,
            devices=devices_text(found.option.product, found.tensor_parallel),
            model_tokens=facts.max_positions,
        )
    else:
        summary = _plain_summary(found, cache_text, kinds, facts.max_positions)
    return SizingResult(
        parameters=facts.parameters,
        weights_bytes=found.weights_bytes,
        kv_bytes_per_token=found.kv_bytes_per_token,
        kv_cache_bytes=found.kv_cache_bytes,
        kv_cache_tokens=(
            found.kv_cache_bytes * found.max_model_len // found.sequence_bytes if found.sequence_bytes else 0
        ),
        overhead_bytes=found.overhead_bytes,
        total_bytes=found.total_bytes,
        device_count=found.tensor_parallel,
        tensor_parallel=found.tensor_parallel,
        max_model_len=found.max_model_len,
        device_kinds=kinds,
        terms=terms,
        summary=summary,
    )


def _overhead_note(demand: Demand, found: Fit) -> str:
    usual = demand.engine.overhead_bytes.get(found.option.kind, 0)
    if demand.overrides.overhead_bytes is not None:
        return ", set by hand"
    return f", as measured (usual: {format_bytes(usual)})" if found.overhead_bytes != usual else ""


def _plain_summary(found: Fit, cache_text: str, kinds: tuple[DeviceKind, ...], model_tokens: int) -> str:
    """The sum where no product is known that it could be compared with: CPU, or no device at all."""
    where = " or ".join(_devices_text(kind, found.tensor_parallel) for kind in kinds)
    overhead = found.overhead_bytes * found.tensor_parallel
    summary = (
        f"weights {format_bytes(found.weights_bytes)} + KV cache {format_bytes(found.kv_cache_bytes)} "
        f"({cache_text}) + overhead {format_bytes(overhead)} = {format_bytes(found.total_bytes)} on {where}"
    )
    if found.shortened:
        summary += (
            f"; context shortened from {model_tokens} to {found.max_model_len} tokens, "
            f"the longest that fits {format_bytes(found.option.memory_bytes * found.tensor_parallel)}"
        )
    return summary


def _cache_text(found: Fit) -> str:
    if found.kv_bytes_per_token == 0:
        return "an encoder keeps none"
    each = f"{format_bytes(found.kv_bytes_per_token)}/token x {found.max_model_len} tokens"
    sequences = found.kv_cache_bytes / found.sequence_bytes
    if found.kv_left_to_engine:
        return f"the rest of its share of the device, {each} x {sequences:.1f} sequences"
    if sequences > SEQUENCES:
        return f"{each} x {SEQUENCES} sequences, at least {format_bytes(found.kv_cache_bytes)}"
    return f"{each} x {sequences:.1f} sequences".replace(".0 sequences", " sequences")
