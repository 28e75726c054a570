"""Parameter counts and cache sizes, a formula a family of architectures.

In come a configuration's values, out come the parts that a model's facts are made of. The formulas give
exactly what `transformers` counts. Pure.
"""

from collections.abc import Callable
from dataclasses import dataclass

from controlplane.sizing.layers import layer_kinds
from controlplane.sizing.reading import Reader, Shape


@dataclass(frozen=True, slots=True)
class Parts:
    """What a family's formula yields; the words are those of `ModelFacts`."""

    parameters: int
    embedding_parameters: int
    feed_forward_widths: tuple[int, ...]
    kv_elements_per_token: int
    kv_replicated: bool = False
    window_elements_per_token: int = 0
    window_tokens: int = 0
    state_layers: int = 0
    state_bytes: int = 0


# Families that normalise queries and keys, a weight for each number of a head.
_NORMED_HEADS = frozenset({"qwen3", "qwen3_moe", "gemma3_text"})


def _decoder(reader: Reader, shape: Shape, model_type: str) -> Parts:
    """Llama and its relatives, dense or with experts."""
    hidden, heads, kv_heads, width = shape.hidden, shape.heads, shape.kv_heads, shape.head_dim
    attention = 2 * hidden * heads * width + 2 * hidden * kv_heads * width
    if model_type == "qwen2":
        attention += (heads + 2 * kv_heads) * width
    elif reader.flag("attention_bias"):
        attention += (heads + 2 * kv_heads) * width + hidden
    if model_type in _NORMED_HEADS:
        attention += 2 * width
    feed_forward, widths = _feed_forward(reader, shape, model_type)
    norms = (4 if model_type in {"gemma2", "gemma3_text"} else 2) * hidden
    tied = reader.flag("tie_word_embeddings", default=model_type in {"gemma", "gemma2", "gemma3_text"})
    embedding = shape.vocabulary * hidden * (1 if tied else 2)
    kinds = layer_kinds(reader, shape, model_type)
    return Parts(
        parameters=embedding + hidden + shape.layers * (attention + norms) + feed_forward,
        embedding_parameters=embedding,
        feed_forward_widths=widths,
        kv_elements_per_token=2 * shape.layers * kv_heads * width,
        window_elements_per_token=2 * kinds.windowed * kv_heads * width,
        window_tokens=kinds.window,
    )


def _hybrid(reader: Reader, shape: Shape, model_type: str) -> Parts:
    """Gated delta nets with full attention at intervals: most layers keep a state of constant size."""
    hidden, heads, kv_heads, width = shape.hidden, shape.heads, shape.kv_heads, shape.head_dim
    kinds = layer_kinds(reader, shape, model_type)
    # The query projection carries an output gate of the same width.
    attention = 3 * hidden * heads * width + 2 * hidden * kv_heads * width + 2 * width
    linear, state_bytes = _delta_net(reader, hidden)
    feed_forward, widths = _hybrid_feed_forward(reader, shape)
    embedding = shape.vocabulary * hidden * (1 if reader.flag("tie_word_embeddings") else 2)
    return Parts(
        parameters=(
            embedding
            + hidden
            + shape.layers * 2 * hidden
            + kinds.full * attention
            + kinds.linear * linear
            + feed_forward
        ),
        embedding_parameters=embedding,
        feed_forward_widths=widths,
        kv_elements_per_token=2 * kinds.full * kv_heads * width,
        state_layers=kinds.linear,
        state_bytes=state_bytes,
    )


def _delta_net(reader: Reader, hidden: int) -> tuple[int, int]:
    """Parameters of one linear layer, and the bytes that it keeps of a sequence."""
    key_heads, value_heads = (
        reader.positive("linear_num_key_heads"),
        reader.positive("linear_num_value_heads"),
    )
    key_width, value_width = reader.positive("linear_key_head_dim"), reader.positive("linear_value_head_dim")
    kernel = reader.positive("linear_conv_kernel_dim")
    keys, values = key_heads * key_width, value_heads * value_width
    convolved = 2 * keys + values
    parameters = (
        hidden * (convolved + values + 2 * value_heads)
        + convolved * kernel
        + 2 * value_heads
        + value_width
        + values * hidden
    )
    # The recurrent state is kept in 32 bits, the last inputs of the convolution in 16.
    return parameters, value_heads * key_width * value_width * 4 + convolved * (kernel - 1) * 2


def _hybrid_feed_forward(reader: Reader, shape: Shape) -> tuple[int, tuple[int, ...]]:
    hidden, layers = shape.hidden, shape.layers
    experts = reader.optional("num_experts") or 0
    if not experts:
        width = reader.positive("intermediate_size")
        return layers * 3 * hidden * width, (width,)
    width, shared = (
        reader.positive("moe_intermediate_size"),
        reader.positive("shared_expert_intermediate_size"),
    )
    sparse = experts * 3 * hidden * width + hidden * experts + 3 * hidden * shared + hidden
    return layers * sparse, (width, shared)


def _feed_forward(reader: Reader, shape: Shape, model_type: str) -> tuple[int, tuple[int, ...]]:
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


def _deepseek(reader: Reader, shape: Shape, model_type: str) -> Parts:
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
    return Parts(
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


def _encoder(reader: Reader, shape: Shape, _model_type: str) -> Parts:
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
    return Parts(
        parameters=table * hidden + 2 * hidden + shape.layers * layer + hidden * hidden + hidden,
        embedding_parameters=table * hidden,
        feed_forward_widths=(width,),
        kv_elements_per_token=0,
    )


FAMILIES: dict[str, Callable[[Reader, Shape, str], Parts]] = {
    "llama": _decoder,
    "mistral": _decoder,
    "mixtral": _decoder,
    "qwen2": _decoder,
    "qwen3": _decoder,
    "qwen3_moe": _decoder,
    "gemma": _decoder,
    "gemma2": _decoder,
    "gemma3_text": _decoder,
    "qwen3_next": _hybrid,
    "qwen3_5_text": _hybrid,
    "deepseek_v2": _deepseek,
    "deepseek_v3": _deepseek,
    "bert": _encoder,
    "roberta": _encoder,
    "xlm-roberta": _encoder,
}

SUPPORTED_MODEL_TYPES = tuple(sorted(FAMILIES))
