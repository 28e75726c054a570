"""What one replica of a model needs: weights, cache, devices. Pure.

`facts_from_config` reads a model's own `config.json`; `size` turns the facts and what was asked for into
a `SizingResult`, or refuses with the numbers and the cheapest change.
"""

from controlplane.sizing.facts import SUPPORTED_MODEL_TYPES, ModelFacts, facts_from_config
from controlplane.sizing.size import size, too_large
from controlplane.sizing.structs import (
    DeviceOption,
    DoesNotFit,
    SizingRequest,
    SizingResult,
    SizingTerm,
)
from controlplane.sizing.units import format_bytes

__all__ = [
    "SUPPORTED_MODEL_TYPES",
    "DeviceOption",
    "DoesNotFit",
    "ModelFacts",
    "SizingRequest",
    "SizingResult",
    "SizingTerm",
    "facts_from_config",
    "format_bytes",
    "size",
    "too_large",
]
