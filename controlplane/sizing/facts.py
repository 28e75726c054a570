"""Facts of a model, read from its own `config.json`.

In comes the parsed configuration (Hugging Face layout) and, where they are known, the bytes of its weight
files; out comes `ModelFacts`. The parameter formulas give exactly what `transformers` counts for the
families in `SUPPORTED_MODEL_TYPES`. Pure: reading the file is the caller's business.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import cast

from core.errors import InvalidArgument
from core.states import Quantization

Config = Mapping[str, object]

FIELD = "model"
# No published model comes near; larger numbers are mistakes and would overflow 64-bit sums.
DIMENSION_MAX = 1 << 31

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
        quantization: How the stored weights are quantized.
        quantization_group: Group that a rank's widths have to divide into; 0 for none.
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
    quantization: Quantization = Quantization.NONE
    quantization_group: int = 0
    weight_file_bytes: int | None = None

    @property
    def encoder_only(self) -> bool:
        """True for models that keep no key/value cache."""
        return self.kv_elements_per_token == 0

    @property
    def kv_bytes_per_token(self) -> int:
        """Key/value cache a token in 16-bit numbers, held once."""
        return self.kv_elements_per_token * 2


@dataclass(frozen=True, slots=True)
class _Reader:
    """Reads a configuration and names whatever is missing or wrong in it."""

    config: Config

    def integer(self, *names: str) -> int:
        """The first of the names that is present; refuses when none is."""
        value = self.optional(*names)
        if value is None:
            raise InvalidArgument.of(
                FIELD, f"the model's config.json lacks `{names[0]}`, which sizing needs; use a complete model"
            )
        return value

    def optional(self, *names: str) -> int | None:
        """The first of the names that is present and not null."""
        for name in names:
            value = self.config.get(name)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < DIMENSION_MAX:
                raise InvalidArgument.of(
                    FIELD, f"the model's config.json has {value!r} for `{name}`; a whole number is expected"
                )
            return value
        return None

    def positive(self, *names: str) -> int:
        """Like `integer`, and refuses zero."""
        value = self.integer(*names)
        if value == 0:
            raise InvalidArgument.of(
                FIELD, f"the model's config.json has 0 for `{names[0]}`; it must be at least 1"
            )
        return value

    def flag(self, name: str, *, default: bool = False) -> bool:
        value = self.config.get(name, default)
        return default if value is None else bool(value)

    def text(self, *names: str) -> str:
        for name in names:
            value = self.config.get(name)
            if isinstance(value, str):
                return value
        return ""

    def mapping(self, *names: str) -> Config:
        for name in names:
            value = self.config.get(name)
            if isinstance(value, Mapping):
                return cast("Config", value)
        return {}


@dataclass(frozen=True, slots=True)
class _Shape:
    """Dimensions that every family has."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int

    @classmethod
    def read(cls, reader: _Reader) -> "_Shape":
        hidden, heads = reader.positive("hidden_size"), reader.positive("num_attention_heads")
        return cls(
            hidden=hidden,
            layers=reader.positive("num_hidden_layers"),
            heads=heads,
            kv_heads=reader.optional("num_key_value_heads") or heads,
            head_dim=reader.optional("head_dim") or hidden // heads,
            vocabulary=reader.positive("vocab_size"),
        )


def facts_from_config(config: Config, *, weight_file_bytes: int | None) -> ModelFacts:
    """Reads a model's facts.

    Args:
        config: Parsed `config.json`.
        weight_file_bytes: Sum of the sizes of its weight files, bytes; None where it is not known.

    Raises:
        InvalidArgument: Field `model`: the architecture is not supported, or a key is missing or wrong.
    """
    reader = _Reader(config)
    model_type = reader.text("model_type")
    family = _FAMILIES.get(model_type)
    if family is None:
        named = f"architecture `{model_type}`" if model_type else "a config.json without `model_type`"
        raise InvalidArgument.of(
            FIELD, f"{named} is not supported; supported are {', '.join(SUPPORTED_MODEL_TYPES)}"
        )
    shape = _Shape.read(reader)
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
        quantization=quantization,
        quantization_group=group,
        weight_file_bytes=weight_file_bytes,
    )


@dataclass(frozen=True, slots=True)
class _Parts:
    """What a family's formula yields."""

    parameters: int
    embedding_parameters: int
    feed_forward_widths: tuple[int, ...]
    kv_elements_per_token: int
    kv_replicated: bool = False


def _decoder(reader: _Reader, shape: _Shape, model_type: str) -> _Parts:
    """Llama and its relatives, dense or with experts."""
    hidden, heads, kv_heads, width = shape.hidden, shape.heads, shape.kv_heads, shape.head_dim
    attention = 2 * hidden * heads * width + 2 * hidden * kv_heads * width
    if model_type == "qwen2":
        attention += (heads + 2 * kv_heads) * width
    elif reader.flag("attention_bias"):
        attention += (heads + 2 * kv_heads) * width + hidden
    if model_type in {"qwen3", "qwen3_moe"}:
        attention += 2 * width
    feed_forward, widths = _feed_forward(reader, shape, model_type)
    norms = (4 if model_type == "gemma2" else 2) * hidden
    tied = reader.flag("tie_word_embeddings", default=model_type in {"gemma", "gemma2"})
    embedding = shape.vocabulary * hidden * (1 if tied else 2)
    return _Parts(
        parameters=embedding + hidden + shape.layers * (attention + norms) + feed_forward,
        embedding_parameters=embedding,
        feed_forward_widths=widths,
        kv_elements_per_token=2 * shape.layers * kv_heads * width,
    )


def _feed_forward(reader: _Reader, shape: _Shape, model_type: str) -> tuple[int, tuple[int, ...]]:
    """Parameters of all layers' feed-forward parts, and the widths that parallelism divides."""
    hidden, layers = shape.hidden, shape.layers
    if model_type == "mixtral":
        width, experts = reader.positive("intermediate_size"), reader.positive("num_local_experts")
        return layers * (experts * 3 * hidden * width + hidden * experts), (width,)
    if model_type == "qwen3_moe":
        width, experts = reader.positive("moe_intermediate_size"), reader.positive("num_experts")
        dense_only = reader.config.get("mlp_only_layers")
        dense_layers = len(dense_only) if isinstance(dense_only, list) else 0
        sparse = (layers - dense_layers) * (experts * 3 * hidden * width + hidden * experts)
        if not dense_layers:
            return sparse, (width,)
        dense_width = reader.positive("intermediate_size")
        return sparse + dense_layers * 3 * hidden * dense_width, (width, dense_width)
    width = reader.positive("intermediate_size")
    bias = 2 * width + hidden if reader.flag("mlp_bias") else 0
    return layers * (3 * hidden * width + bias), (width,)


def _deepseek(reader: _Reader, shape: _Shape, model_type: str) -> _Parts:
    """Multi-head latent attention: the cache keeps one compressed vector a token and layer."""
    hidden, heads = shape.hidden, shape.heads
    rank, rope = reader.positive("kv_lora_rank"), reader.positive("qk_rope_head_dim")
    plain, value = reader.positive("qk_nope_head_dim"), reader.positive("v_head_dim")
    query_rank = reader.optional("q_lora_rank")
    query = hidden * heads * (plain + rope)
    if query_rank:
        query = hidden * query_rank + query_rank + query_rank * heads * (plain + rope)
    attention = (
        query + hidden * (rank + rope) + rank + rank * heads * (plain + value) + heads * value * hidden
    )
    dense_width, width = reader.positive("intermediate_size"), reader.positive("moe_intermediate_size")
    experts, shared = reader.positive("n_routed_experts"), reader.optional("n_shared_experts") or 0
    dense = min(reader.optional("first_k_dense_replace") or 0, shape.layers)
    correction = experts if model_type == "deepseek_v3" else 0
    sparse = (experts + shared) * 3 * hidden * width + experts * hidden + correction
    embedding = shape.vocabulary * hidden * (1 if reader.flag("tie_word_embeddings") else 2)
    return _Parts(
        parameters=(
            embedding
            + hidden
            + shape.layers * (attention + 2 * hidden)
            + dense * 3 * hidden * dense_width
            + (shape.layers - dense) * sparse
        ),
        embedding_parameters=embedding,
        feed_forward_widths=(dense_width, width),
        kv_elements_per_token=shape.layers * (rank + rope),
        kv_replicated=True,
    )


def _encoder(reader: _Reader, shape: _Shape, _model_type: str) -> _Parts:
    """BERT: every token sees every other at once, so nothing is cached."""
    hidden, width = shape.hidden, reader.positive("intermediate_size")
    types = reader.optional("type_vocab_size")
    table = shape.vocabulary + reader.positive("max_position_embeddings") + (2 if types is None else types)
    layer = (
        4 * (hidden * hidden + hidden)
        + 2 * hidden
        + hidden * width
        + width
        + width * hidden
        + hidden
        + 2 * hidden
    )
    return _Parts(
        parameters=table * hidden + 2 * hidden + shape.layers * layer + hidden * hidden + hidden,
        embedding_parameters=table * hidden,
        feed_forward_widths=(width,),
        kv_elements_per_token=0,
    )


_FAMILIES: dict[str, Callable[[_Reader, _Shape, str], _Parts]] = {
    "llama": _decoder,
    "mistral": _decoder,
    "mixtral": _decoder,
    "qwen2": _decoder,
    "qwen3": _decoder,
    "qwen3_moe": _decoder,
    "gemma": _decoder,
    "gemma2": _decoder,
    "deepseek_v2": _deepseek,
    "deepseek_v3": _deepseek,
    "bert": _encoder,
    "roberta": _encoder,
    "xlm-roberta": _encoder,
}

SUPPORTED_MODEL_TYPES = tuple(sorted(_FAMILIES))


def _max_positions(reader: _Reader) -> int:
    """Longest context; rotary scaling of some kinds stretches what the model was trained with."""
    positions = reader.positive("max_position_embeddings")
    if reader.text("model_type") in {"roberta", "xlm-roberta"}:
        # Two positions are taken by padding.
        return max(1, positions - 2)
    scaling = _Reader(reader.mapping("rope_scaling", "rope_parameters"))
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


def _stored_quantization(reader: _Reader) -> tuple[Quantization, int]:
    stored = _Reader(reader.mapping("quantization_config"))
    quantization = _QUANTIZATIONS.get(stored.text("quant_method"), Quantization.NONE)
    block = stored.config.get("weight_block_size")
    if isinstance(block, list) and block and isinstance(block[0], int) and block[0] > 0:
        return quantization, block[0]
    group = stored.config.get("group_size")
    return quantization, group if isinstance(group, int) and group > 0 else 0
