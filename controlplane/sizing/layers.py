"""Which layers of a model attend to everything, to a window, or keep a constant state.

In comes a configuration, out come counts of layers by what they keep of a sequence. Newer configurations
list `layer_types`; older ones leave it to each family's custom. Pure.
"""

from dataclasses import dataclass

from controlplane.sizing.reading import Reader, Shape

# Families whose configurations name a window that they use on some layers only; the others use it on all.
_ALTERNATING = frozenset({"gemma2"})
_FULL_EVERY = frozenset({"gemma3_text"})
_WINDOW_ON_REQUEST = frozenset({"qwen2", "qwen3", "qwen3_moe"})
_LINEAR = frozenset({"qwen3_next", "qwen3_5_text"})


@dataclass(frozen=True, slots=True)
class LayerKinds:
    """Layers by what they keep.

    Attributes:
        full: Keep every token.
        windowed: Keep the last `window` tokens.
        linear: Keep a constant state a sequence.
        window: Width of the window, tokens; 0 where no layer has one.
    """

    full: int
    windowed: int = 0
    linear: int = 0
    window: int = 0


def layer_kinds(reader: Reader, shape: Shape, model_type: str) -> LayerKinds:
    """Counts a model's layers by kind."""
    layers = shape.layers
    window = reader.optional("sliding_window") or 0
    chunk = reader.optional("attention_chunk_size") or 0
    listed = reader.config.get("layer_types")
    if isinstance(listed, list) and len(listed) == layers:
        windowed = listed.count("sliding_attention") if window else 0
        chunked = listed.count("chunked_attention") if chunk else 0
        linear = listed.count("linear_attention")
        return LayerKinds(layers - windowed - chunked - linear, windowed + chunked, linear, window or chunk)
    if model_type in _LINEAR:
        full = layers // (reader.optional("full_attention_interval") or 4)
        return LayerKinds(full, linear=layers - full)
    full = _full_layers(reader, layers, model_type) if window else layers
    return LayerKinds(full, windowed=layers - full, window=window if full < layers else 0)


def _full_layers(reader: Reader, layers: int, model_type: str) -> int:
    """Layers without a window in a model that names one, by the custom of its family."""
    if model_type in _ALTERNATING:
        return layers // 2
    if model_type in _FULL_EVERY:
        return layers // (reader.optional("sliding_window_pattern") or 6)
    if model_type in _WINDOW_ON_REQUEST:
        on = reader.flag("use_sliding_window")
        return min(reader.optional("max_window_layers") or 0, layers) if on else layers
    return 0
