"""Corrects what formulas say by what engines were measured to need.

In come a computed number and the last measurement of the same engine, model, quantization and kind of
device; out comes the number to go on with, and why. A measurement that is far from the formula is not
believed: it is more likely of something else than right. Pure.
"""

from controlplane.sizing.structs import Calibration, DeviceOption
from core.states import DeviceKind

# Beyond this factor either way a measurement is taken for one of something else.
_BELIEVED = 2.0
# Overheads differ more between machines, and the formula for them is one number for all models.
_BELIEVED_OVERHEAD = 4.0


def calibrated_weights(computed: int, measured: Calibration | None) -> int | None:
    """Returns measured weights over all devices, bytes; None where there are none to be believed."""
    if measured is None or measured.weights_bytes is None:
        return None
    return measured.weights_bytes if _near(measured.weights_bytes, computed, _BELIEVED) else None


def calibrated_overhead(
    computed: int, weights: int, measured: Calibration | None, option: DeviceOption
) -> int | None:
    """Returns the measured overhead of one device, bytes; None where there is none to be believed.

    On a CPU share it corrects upward only: memory right after a start tells nothing of what a full batch will
    need. On a GPU the engine itself has run a full batch before it sized its cache.

    Args:
        computed: What the formula says, a device.
        weights: Over all devices, as they were reckoned.
        measured: The last measurement.
        option: Where.
    """
    if measured is None or measured.besides_cache_bytes is None:
        return None
    each = (measured.besides_cache_bytes - weights) // measured.tensor_parallel
    if not _near(each, computed, _BELIEVED_OVERHEAD):
        return None
    return max(each, computed) if option.kind is DeviceKind.CPU else each


def cache_scale(computed_sequence_bytes: int, measured: Calibration | None) -> float:
    """Returns by how much a sequence takes more cache than the formula says; 1.0 where nothing is known.

    Args:
        computed_sequence_bytes: Cache of one sequence of `measured.max_model_len` tokens, over all devices.
        measured: The last measurement.
    """
    if measured is None or not measured.kv_cache_bytes or not measured.kv_cache_tokens:
        return 1.0
    if computed_sequence_bytes <= 0 or measured.max_model_len <= 0:
        return 1.0
    actual = measured.kv_cache_bytes * measured.max_model_len / measured.kv_cache_tokens
    scale = actual / computed_sequence_bytes
    return scale if 1 / _BELIEVED <= scale <= _BELIEVED else 1.0


def _near(measured: int, computed: int, factor: float) -> bool:
    return measured > 0 and (computed <= 0 or 1 / factor <= measured / computed <= factor)
