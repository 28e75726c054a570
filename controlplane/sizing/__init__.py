"""What one replica of a model needs: weights, cache, devices. Pure.

`facts_from_config` reads a model's own `config.json`; `size` turns the facts and what was asked for into
a `SizingResult`, or refuses with the numbers and the cheapest change. `survey` lists everything that fits,
on the GPUs that a `KnowledgeBase` knows.
"""

from controlplane.sizing.catalog import KnowledgeBase, KnownModel, knowledge_from_data
from controlplane.sizing.facts import SUPPORTED_MODEL_TYPES, ModelFacts, facts_from_config
from controlplane.sizing.size import size, too_large
from controlplane.sizing.structs import (
    Calibration,
    DeviceOption,
    DoesNotFit,
    EngineFacts,
    GpuModel,
    SizingRequest,
    SizingResult,
    SizingTerm,
)
from controlplane.sizing.survey import Alternative, GpuFit, Survey, survey
from controlplane.sizing.units import format_bytes

__all__ = [
    "SUPPORTED_MODEL_TYPES",
    "Alternative",
    "Calibration",
    "DeviceOption",
    "DoesNotFit",
    "EngineFacts",
    "GpuFit",
    "GpuModel",
    "KnowledgeBase",
    "KnownModel",
    "ModelFacts",
    "SizingRequest",
    "SizingResult",
    "SizingTerm",
    "Survey",
    "facts_from_config",
    "format_bytes",
    "knowledge_from_data",
    "size",
    "survey",
    "too_large",
]
