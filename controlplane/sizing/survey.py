"""Everything that a model fits on: each GPU and count, and which of them to take.

In come what is asked for and the GPUs to try, out comes a `Survey` with every fit, a recommendation and
the terms of its sum; or, where nothing fits, why, and what would. Works without a cluster. Pure.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from controlplane.sizing.catalog import device_option
from controlplane.sizing.fit import (
    CONTEXT_MIN,
    Demand,
    Fit,
    fit,
    kv_bytes_per_token,
    least_bytes,
    overhead_bytes,
    parallel_degrees,
    state_bytes_per_sequence,
    usable_bytes,
    weights_bytes,
)
from controlplane.sizing.sentences import devices_text, fit_sentence, sum_text
from controlplane.sizing.size import checked_demand, too_short
from controlplane.sizing.structs import DeviceOption, GpuModel, SizingRequest, SizingTerm
from controlplane.sizing.units import GIB, format_bytes
from core.states import Quantization


@dataclass(frozen=True, slots=True)
class GpuFit:
    """One way to run a model on a kind of GPU."""

    gpu: GpuModel
    fit: Fit

    @property
    def count(self) -> int:
        """Devices of one replica."""
        return self.fit.tensor_parallel

    @property
    def text(self) -> str:
        """Such as `8x H200`."""
        return f"{self.count}x {self.gpu.name}"


@dataclass(frozen=True, slots=True)
class Alternative:
    """What would fit where nothing of what was asked for does."""

    quantization: Quantization
    weights_bytes: int
    found: GpuFit
    context_changed: bool = False

    @property
    def text(self) -> str:
        """One clause for a person."""
        what = f"{self.quantization.name.lower()} weights ({format_bytes(self.weights_bytes)})"
        if self.quantization is Quantization.NONE:
            what = f"16-bit weights ({format_bytes(self.weights_bytes)})"
        length = f" with max_model_len {self.found.fit.max_model_len}" if self.context_changed else ""
        return f"{what} on {self.found.text}{length}"


@dataclass(frozen=True, slots=True)
class Survey:
    """Everything that a model fits on.

    Attributes:
        parameters: Of the model.
        weights_bytes: As loaded.
        kv_bytes_per_token: Held once, whatever the number of devices.
        fits: Every fit, in the order of the GPUs.
        recommended: The one to take; None where nothing fits.
        terms: Of the recommendation's sum, or of the largest offer's where nothing fits; then the sum as a
            sentence (`total`), what was passed over (`refused`) and how to start it (`launch`).
        why: Why nothing fits; empty where something does.
        alternatives: What would fit where nothing does.
    """

    parameters: int
    weights_bytes: int
    kv_bytes_per_token: int
    fits: tuple[GpuFit, ...]
    recommended: GpuFit | None
    terms: tuple[SizingTerm, ...]
    why: str = ""
    alternatives: tuple[Alternative, ...] = ()


def survey(
    request: SizingRequest, gpus: Sequence[GpuModel], *, known: Sequence[GpuModel] | None = None
) -> Survey:
    """Tries a model on GPUs.

    Args:
        request: Engine, model and what was asked for.
        gpus: GPUs to try.
        known: All GPUs there are, from which a way out is named where none of `gpus` will do. None means
            that nobody chose: the lowest tier that fits is then recommended.

    Raises:
        InvalidArgument: As `size`.
    """
    demand = checked_demand(request, [device_option(gpu) for gpu in gpus])
    fits = tuple(_fits(demand, gpus))
    best = _recommended(fits, by_tier=known is None)
    weights, _ = weights_bytes(demand)
    terms: tuple[SizingTerm, ...]
    why = ""
    alternatives: tuple[Alternative, ...] = ()
    if best is None:
        refusal = _refusal(demand, gpus)
        why, terms = refusal.explanation, (*_refused_terms(demand, gpus), refusal)
        alternatives = tuple(_alternatives(demand, gpus, gpus if known is None else known))
    else:
        lower = [gpu for gpu in gpus if gpu.tier < best.gpu.tier] if known is None else []
        passed = (_refusal(demand, lower),) if lower else ()
        terms = (*_fit_terms(demand, best), *passed, _launch_term(demand, best))
    return Survey(
        parameters=demand.facts.parameters,
        weights_bytes=weights,
        kv_bytes_per_token=kv_bytes_per_token(demand.facts, 1, demand.overrides.kv_element_bytes),
        fits=fits,
        recommended=best,
        terms=terms,
        why=why,
        alternatives=alternatives,
    )


def _fits(demand: Demand, gpus: Sequence[GpuModel]) -> Iterator[GpuFit]:
    for gpu in gpus:
        option = device_option(gpu)
        for degree in parallel_degrees(demand, option):
            found = fit(demand, option, degree)
            if found is not None:
                yield GpuFit(gpu, found)


def _recommended(fits: Sequence[GpuFit], *, by_tier: bool) -> GpuFit | None:
    """A useful context first, then the fewest devices, then the cheapest."""
    return min(
        fits,
        key=lambda each: (
            each.gpu.tier if by_tier else 0,
            too_short(each.fit),
            each.count,
            each.gpu.cost_rank,
        ),
        default=None,
    )


def _fit_terms(demand: Demand, best: GpuFit) -> tuple[SizingTerm, ...]:
    found = best.fit
    _, weights_text = weights_bytes(demand)
    cache_text = "an encoder keeps none"
    if found.sequence_bytes:
        cache_text = (
            f"one sequence of {found.max_model_len} tokens, {found.kv_bytes_per_token} bytes a token"
            f"{_cap_text(demand, found.option)}; {found.kv_tokens} tokens fit in all, "
            f"{found.kv_tokens / found.max_model_len:.1f} sequences at once"
        )
    return (
        SizingTerm("weights", found.weights_bytes, weights_text),
        SizingTerm("kv_cache", found.sequence_bytes, cache_text),
        _overhead_term(found.overhead_bytes, found.tensor_parallel),
        SizingTerm(
            "total",
            found.weights_bytes + found.sequence_bytes + found.overhead_bytes * found.tensor_parallel,
            fit_sentence(
                found,
                cache=found.sequence_bytes,
                devices=devices_text(best.gpu.short_name, best.count),
                model_tokens=demand.facts.max_positions,
            ),
        ),
    )


def _cap_text(demand: Demand, option: DeviceOption) -> str:
    facts = demand.facts
    parts = []
    if facts.window_elements_per_token:
        share = facts.window_elements_per_token / facts.kv_elements_per_token
        parts.append(f"of which {share:.0%} for the last {facts.window_tokens} tokens only")
    if facts.state_layers:
        states = format_bytes(state_bytes_per_sequence(demand, option))
        parts.append(f"and {states} a sequence whatever its length")
    return "".join(f", {part}" for part in parts)


def _overhead_term(each: int, count: int) -> SizingTerm:
    return SizingTerm("overhead", each * count, f"{format_bytes(each)} x {count} device(s): the engine's own")


def _launch_term(demand: Demand, best: GpuFit) -> SizingTerm:
    """The engine's flags that the sizing stands for."""
    flags = [f"--tensor-parallel-size {best.count}", f"--max-model-len {best.fit.max_model_len}"]
    if demand.quantization is not Quantization.NONE:
        flags.append(f"--quantization {demand.quantization.name.lower()}")
    if not best.gpu.bfloat16:
        # Said aloud, since most models are published in bfloat16.
        flags.append("--dtype half")
    return SizingTerm("launch", 0, " ".join(flags))


def _largest(demand: Demand, gpus: Sequence[GpuModel]) -> tuple[GpuModel, int, int]:
    """The GPU whose node offers the most, how many of it can be used together, and how much they offer."""

    def offer(gpu: GpuModel) -> tuple[int, int]:
        option = device_option(gpu)
        degree = max(parallel_degrees(demand, option), default=1)
        return usable_bytes(option, demand) * degree, degree

    gpu = max(gpus, key=offer)
    usable, degree = offer(gpu)
    return gpu, degree, usable


def _least_tokens(demand: Demand) -> int:
    return demand.max_model_len or min(CONTEXT_MIN, demand.facts.max_positions)


def _refused_terms(demand: Demand, gpus: Sequence[GpuModel]) -> tuple[SizingTerm, ...]:
    gpu, degree, _ = _largest(demand, gpus)
    option, tokens = device_option(gpu), _least_tokens(demand)
    weights, weights_text = weights_bytes(demand)
    cache = least_bytes(demand, option, degree, tokens)
    return (
        SizingTerm("weights", weights, weights_text),
        SizingTerm(
            "kv_cache", cache, f"one sequence of {tokens} tokens" if cache else "an encoder keeps none"
        ),
        _overhead_term(overhead_bytes(option, demand), degree),
    )


def _refusal(demand: Demand, gpus: Sequence[GpuModel]) -> SizingTerm:
    """Why even the most that one node has of these GPUs is not enough."""
    gpu, degree, usable = _largest(demand, gpus)
    weights, cache, overhead = (each.bytes for each in _refused_terms(demand, gpus))
    tokens = _least_tokens(demand)
    needed = weights + cache + overhead
    terms = sum_text(weights=weights, cache=cache, context=tokens, one_sequence=cache, overhead=overhead)
    return SizingTerm(
        "refused",
        needed,
        f"{terms} = {needed / GIB:.1f} of {usable / GIB:.1f} GiB usable on "
        f"{devices_text(gpu.short_name, degree)} ({gpu.memory_bytes * degree / GIB:.1f} GiB of memory): "
        "does not fit",
    )


def _alternatives(
    demand: Demand, gpus: Sequence[GpuModel], known: Sequence[GpuModel]
) -> Iterator[Alternative]:
    """A shorter context, other GPUs, other weights: whichever of them would fit."""
    if demand.max_model_len is not None:
        shorter = replace(demand, max_model_len=None, overrides=replace(demand.overrides, max_model_len=None))
        yield from _alternative(shorter, gpus, context_changed=True)
    yield from _alternative(demand, [gpu for gpu in known if gpu not in gpus], by_tier=True)
    for quantization in (Quantization.FP8, Quantization.AWQ):
        # Other weights are another checkpoint: what the files of this one hold does not apply.
        facts = replace(
            demand.facts,
            quantization=Quantization.NONE,
            quantization_group=0,
            quantization_bits=4,
            weight_file_bytes=None,
        )
        other = replace(demand, facts=facts, quantization=quantization)
        if weights_bytes(other)[0] < weights_bytes(demand)[0] * 0.9:
            yield from _alternative(other, gpus)


def _alternative(
    demand: Demand, gpus: Sequence[GpuModel], *, by_tier: bool = False, context_changed: bool = False
) -> Iterator[Alternative]:
    best = _recommended(tuple(_fits(demand, gpus)), by_tier=by_tier)
    if best is not None:
        yield Alternative(demand.quantization, weights_bytes(demand)[0], best, context_changed)
