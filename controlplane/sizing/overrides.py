"""Engine arguments that override a term of the sizing.

In come `extra_args` as the user wrote them, out go checked values; absent ones are None. Arguments that
sizing does not know pass by untouched: they are the engine's business.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from core.errors import InvalidArgument

# Far beyond any model; larger values are mistakes.
TOKENS_MAX = 100_000_000
TENSOR_PARALLEL_MAX = 1024
BYTES_MAX = 1 << 50

# For sizing alone: no engine has such arguments, and the node agent leaves them out of its command line.
WEIGHTS_ARGUMENT = "sizing_weights_bytes"
OVERHEAD_ARGUMENT = "sizing_overhead_bytes"

_SUFFIXES = {"k": 1000, "K": 1024, "m": 1000**2, "M": 1024**2}


@dataclass(frozen=True, slots=True)
class Overrides:
    """What the user set by hand.

    Attributes:
        max_model_len: Context, tokens.
        tensor_parallel: Devices that share the weights.
        kv_cache_bytes: Key/value cache a device, bytes.
        memory_utilization: Share of a device that the engine takes, 0 to 1.
        kv_element_bytes: Bytes of a number in the cache.
        batch_tokens: Tokens that the engine computes in one step.
        weights_bytes: Weights over all devices, where the user knows better than the formula.
        overhead_bytes: What the engine needs besides, a device, likewise.
    """

    max_model_len: int | None = None
    tensor_parallel: int | None = None
    kv_cache_bytes: int | None = None
    memory_utilization: float | None = None
    kv_element_bytes: int = 2
    batch_tokens: int | None = None
    weights_bytes: int | None = None
    overhead_bytes: int | None = None


def read_overrides(extra_args: Mapping[str, object]) -> Overrides:
    """Reads the arguments that sizing honours.

    Raises:
        InvalidArgument: Field `extra_args.<name>`: the value cannot be meant.
    """
    values = {name.lstrip("-").replace("-", "_"): value for name, value in extra_args.items()}
    return Overrides(
        max_model_len=_tokens(values.get("max_model_len")),
        tensor_parallel=_whole(values, "tensor_parallel_size", TENSOR_PARALLEL_MAX),
        kv_cache_bytes=_whole(values, "kv_cache_memory_bytes", BYTES_MAX),
        memory_utilization=_share(values.get("gpu_memory_utilization")),
        kv_element_bytes=1 if str(values.get("kv_cache_dtype", "")).startswith(("fp8", "int8")) else 2,
        batch_tokens=_whole(values, "max_num_batched_tokens", TOKENS_MAX),
        weights_bytes=_whole(values, WEIGHTS_ARGUMENT, BYTES_MAX),
        overhead_bytes=_whole(values, OVERHEAD_ARGUMENT, BYTES_MAX),
    )


def check_tokens(field: str, tokens: int) -> int:
    """Returns a context length that can be meant.

    Raises:
        InvalidArgument: It is below 1 or absurdly large.
    """
    if tokens < 1:
        raise InvalidArgument.of(
            field, f"must be at least 1 token, not {tokens}; leave it out to let it be worked out"
        )
    if tokens > TOKENS_MAX:
        raise InvalidArgument.of(
            field, f"{tokens} tokens is more than any model takes (at most {TOKENS_MAX})"
        )
    return tokens


def _tokens(value: object) -> int | None:
    field = "extra_args.max_model_len"
    if value is None or value in ("auto", -1):
        return None
    if isinstance(value, str):
        match = re.fullmatch(r"(\d{1,12})([kKmM]?)", value.strip())
        if match is None:
            raise InvalidArgument.of(field, f"{value!r} is no number of tokens; write 32768 or 32k")
        return check_tokens(field, int(match.group(1)) * _SUFFIXES.get(match.group(2), 1))
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidArgument.of(field, f"{value!r} is no number of tokens; write 32768 or 32k")
    return check_tokens(field, value)


def _whole(values: Mapping[str, object], name: str, maximum: int) -> int | None:
    value = values.get(name)
    if value is None:
        return None
    if isinstance(value, str) and value.isdecimal():
        value = int(value[:20])
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= maximum:
        raise InvalidArgument.of(
            f"extra_args.{name}", f"must be a whole number from 1 to {maximum}, not {value!r}"
        )
    return value


def _share(value: object) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
        raise InvalidArgument.of(
            "extra_args.gpu_memory_utilization", f"must be more than 0 and at most 1, not {value!r}"
        )
    return float(value)
