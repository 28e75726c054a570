"""Facts of a model, read from its own `config.json`.

In comes the parsed configuration (Hugging Face layout) and, where they are known, the bytes of its weight
files; out comes `ModelFacts`. The parameter formulas give exactly what `transformers` counts for the
families in `SUPPORTED_MODEL_TYPES`. Pure: reading the file is the caller's business.
"""

from dataclasses import dataclass

from controlplane.sizing.families import FAMILIES
from controlplane.sizing.reading import FIELD, Config, Reader, Shape
from core.errors import InvalidArgument
from core.states import Quantization

SUPPORTED_MODEL_TYPES = tuple(sorted(FAMILIES))

_BYTES_OF_TYPE = {"float32": 4, "float": 4, "bfloat16": 2, "float16": 2, "half": 2, "float8_e4m3fn": 1}
_QUANTIZATIONS = {
    "awq": Quantization.AWQ,
    "gptq": Quantization.GPTQ,
    "fp8": Quantization.FP8,
}


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What a model's configuration says.

    Attributes:
        model_type: Family, as the configuration names it.
        parameters: All of them.
        embedding_parameters: Embedding and output head; they stay 16-bit under quantization.
        layers: Transformer layers.
        attention_heads: Query heads.
        kv_heads: Key/value heads.
        head_dim: Width of a head.
        feed_forward_widths: Widths that tensor parallelism has to divide.
        max_positions: Longest context, tokens.
        dtype_bytes: Bytes of a stored parameter.
        kv_elements_per_token: Numbers that the cache keeps a token, over all layers; 0 for encoders.
        kv_replicated: True where every tensor-parallel rank holds the whole cache (MLA).
        window_elements_per_token: Those of them that sliding-window layers keep.
        window_tokens: Tokens that such a layer looks back; 0 for none.
        state_layers: Linear-attention layers, which keep a state whatever the length of a sequence.
        state_bytes: What one of them keeps of a sequence, bytes.
        quantization: How the stored weights are quantized.
        quantization_group: Group that a rank's widths have to divide into; 0 for none.
        quantization_bits: Bits of a weight stored as AWQ or GPTQ.
        weight_file_bytes: Size of the weight files; None where it is not known.
    """

    model_type: str
    parameters: int
    embedding_parameters: int
    layers: int
    attention_heads: int
    kv_heads: int
    head_dim: int
    feed_forward_widths: tuple[int, ...]
    max_positions: int
    dtype_bytes: int = 2
    kv_elements_per_token: int = 0
    kv_replicated: bool = False
    window_elements_per_token: int = 0
    window_tokens: int = 0
    state_layers: int = 0
    state_bytes: int = 0
    quantization: Quantization = Quantization.NONE
    quantization_group: int = 0
    quantization_bits: int = 4
    weight_file_bytes: int | None = None

    @property
    def encoder_only(self) -> bool:
        """True for models that keep no key/value cache."""
        return self.kv_elements_per_token == 0

    @property
    def kv_bytes_per_token(self) -> int:
        """Key/value cache a token in 16-bit numbers, held once."""
        return self.kv_elements_per_token * 2


def facts_from_config(config: Config, *, weight_file_bytes: int | None) -> ModelFacts:
    """Reads a model's facts.

    Args:
        config: Parsed `config.json`.
        weight_file_bytes: Sum of the sizes of its weight files, bytes; None where it is not known.

    Raises:
        InvalidArgument: Field `model`: the architecture is not supported, or a key is missing or wrong.
    """
    reader = _text_part(Reader(config))
    model_type = reader.text("model_type")
    family = FAMILIES.get(model_type)
    if family is None:
        named = f"architecture `{model_type}`" if model_type else "a config.json without `model_type`"
        raise InvalidArgument.of(
            FIELD, f"{named} is not supported; supported are {', '.join(SUPPORTED_MODEL_TYPES)}"
        )
    shape = Shape.read(reader)
    parts = family(reader, shape, model_type)
    quantization, group = _stored_quantization(reader)
    return ModelFacts(
        model_type=model_type,
        parameters=parts.parameters,
        embedding_parameters=parts.embedding_parameters,
        layers=shape.layers,
        attention_heads=shape.heads,
        kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        feed_forward_widths=parts.feed_forward_widths,
        max_positions=_max_positions(reader),
        dtype_bytes=_BYTES_OF_TYPE.get(reader.text("torch_dtype", "dtype"), 2),
        kv_elements_per_token=parts.kv_elements_per_token,
        kv_replicated=parts.kv_replicated,
        window_elements_per_token=parts.window_elements_per_token,
        window_tokens=parts.window_tokens,
        state_layers=parts.state_layers,
        state_bytes=parts.state_bytes,
        quantization=quantization,
        quantization_group=group,
        quantization_bits=_stored_bits(reader),
        weight_file_bytes=weight_file_bytes,
    )


def _max_positions(reader: Reader) -> int:
    """Longest context; rotary scaling of some kinds stretches what the model was trained with."""
    positions = reader.positive("max_position_embeddings")
    if reader.text("model_type") in {"roberta", "xlm-roberta"}:
        # Two positions are taken by padding.
        return max(1, positions - 2)
    scaling = Reader(reader.mapping("rope_scaling", "rope_parameters"))
    factor = scaling.config.get("factor")
    if isinstance(factor, bool) or not isinstance(factor, int | float) or not 1 <= factor <= 1024:
        return positions
    match scaling.text("rope_type", "type"):
        case "yarn":
            return int((scaling.optional("original_max_position_embeddings") or positions) * factor)
        case "linear" | "dynamic":
            return int(positions * factor)
        case _:
            return positions


def _stored_quantization(reader: Reader) -> tuple[Quantization, int]:
    stored = Reader(reader.mapping("quantization_config"))
    quantization = _QUANTIZATIONS.get(stored.text("quant_method"), Quantization.NONE)
    block = stored.config.get("weight_block_size")
    if isinstance(block, list) and block and isinstance(block[0], int) and block[0] > 0:
        return quantization, block[0]
    group = stored.config.get("group_size")
    return quantization, group if isinstance(group, int) and group > 0 else 0


def _stored_bits(reader: Reader) -> int:
    """Bits of a stored AWQ or GPTQ weight."""
    bits = Reader(reader.mapping("quantization_config")).config.get("bits")
    return bits if isinstance(bits, int) and not isinstance(bits, bool) and 2 <= bits <= 8 else 4


def _text_part(reader: Reader) -> Reader:
    """The language model of a configuration that wraps one; what stands outside holds where it is silent."""
    inner = reader.mapping("text_config")
    if not inner:
        return reader
    merged = {**{name: value for name, value in reader.config.items() if name != "text_config"}, **inner}
    wrapped, own = reader.text("model_type"), Reader(inner).text("model_type")
    # Older configurations leave the inner type out; the families name it after the outer one.
    merged["model_type"] = own or f"{wrapped}_text"
    return Reader(merged)
