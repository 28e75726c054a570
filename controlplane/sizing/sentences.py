"""A sizing as one sentence that a person can check with a calculator.

In comes a fit or what a refusal is made of, out comes the sum with every term: `weights 38.6 GiB + KV
10.0 GiB at 32k x 1 + overhead 3.5 GiB = 52.1 of 73.6 GiB usable on A100-80: fits with tp=1`. Pure.
"""

from controlplane.sizing.fit import Fit
from controlplane.sizing.units import GIB, format_bytes


def format_tokens(tokens: int) -> str:
    """Writes a context: `32k` for 32768, whole numbers of tokens otherwise."""
    return f"{tokens // 1024}k" if tokens and tokens % 1024 == 0 else str(tokens)


def sum_text(*, weights: int, cache: int, context: int, one_sequence: int, overhead: int) -> str:
    """Writes the terms, without what they come to."""
    if one_sequence:
        sequences = f"{cache / one_sequence:.1f}".removesuffix(".0")
        kept = f"KV {format_bytes(cache)} at {format_tokens(context)} x {sequences}"
    else:
        kept = "no KV (an encoder)"
    return f"weights {format_bytes(weights)} + {kept} + overhead {format_bytes(overhead)}"


def fit_sentence(found: Fit, *, cache: int, devices: str, model_tokens: int) -> str:
    """Writes a fit.

    Args:
        found: The fit.
        cache: Cache that is spoken of, over all devices, bytes.
        devices: What the devices are called, such as `2x A100-80`.
        model_tokens: Longest context of the model.
    """
    overhead = found.overhead_bytes * found.tensor_parallel
    terms = sum_text(
        weights=found.weights_bytes,
        cache=cache,
        context=found.max_model_len,
        one_sequence=found.sequence_bytes,
        overhead=overhead,
    )
    total = found.weights_bytes + cache + overhead
    sentence = (
        f"{terms} = {total / GIB:.1f} of {found.usable_bytes / GIB:.1f} GiB usable on {devices}: "
        f"fits with tp={found.tensor_parallel}"
    )
    if found.shortened:
        sentence += (
            f"; context shortened from {model_tokens} to {found.max_model_len} tokens, the longest that fits"
        )
    return sentence


def devices_text(name: str, count: int) -> str:
    """Writes devices: `A100-80`, `2x A100-80`."""
    return name if count == 1 else f"{count}x {name}"
