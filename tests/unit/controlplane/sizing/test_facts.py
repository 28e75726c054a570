from typing import Any

import pytest

from controlplane.sizing import SUPPORTED_MODEL_TYPES, facts_from_config
from core.errors import InvalidArgument
from core.states import Quantization


def decoder(model_type: str, **fields: Any) -> dict[str, Any]:
    return {"model_type": model_type, "max_position_embeddings": 32768, "torch_dtype": "bfloat16", **fields}


def dimensions(
    layers: int, hidden: int, heads: int, kv_heads: int, head_dim: int, width: int, vocabulary: int
) -> dict[str, Any]:
    return {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "intermediate_size": width,
        "vocab_size": vocabulary,
    }


DEEPSEEK_V3 = decoder(
    "deepseek_v3",
    **dimensions(61, 7168, 128, 128, 0, 18432, 129280),
    moe_intermediate_size=2048,
    n_routed_experts=256,
    n_shared_experts=1,
    first_k_dense_replace=3,
    kv_lora_rank=512,
    q_lora_rank=1536,
    qk_rope_head_dim=64,
    qk_nope_head_dim=128,
    v_head_dim=128,
)
BGE_LARGE = {
    "model_type": "bert",
    "num_hidden_layers": 24,
    "hidden_size": 1024,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
    "vocab_size": 21128,
    "max_position_embeddings": 512,
    "torch_dtype": "float32",
}
QWEN3_235B = decoder(
    "qwen3_moe",
    **dimensions(94, 4096, 64, 4, 128, 12288, 151936),
    moe_intermediate_size=1536,
    num_experts=128,
)
MIXTRAL = decoder("mixtral", **dimensions(32, 4096, 32, 8, 128, 14336, 32000), num_local_experts=8)
GEMMA2_9B = decoder("gemma2", **dimensions(42, 3584, 16, 8, 256, 14336, 256000), tie_word_embeddings=True)


@pytest.mark.parametrize(
    ("config", "billions", "kv_bytes"),
    [
        (decoder("qwen2", **dimensions(28, 3584, 28, 4, 128, 18944, 152064)), 7.616, 57_344),
        (decoder("qwen2", **dimensions(80, 8192, 64, 8, 128, 29568, 152064)), 72.706, 327_680),
        (decoder("qwen3", **dimensions(36, 4096, 32, 8, 128, 12288, 151936)), 8.191, 147_456),
        (decoder("llama", **dimensions(32, 4096, 32, 8, 128, 14336, 128256)), 8.030, 131_072),
        (decoder("llama", **dimensions(80, 8192, 64, 8, 128, 28672, 128256)), 70.554, 327_680),
        (decoder("mistral", **dimensions(32, 4096, 32, 8, 128, 14336, 32768)), 7.248, 131_072),
        (MIXTRAL, 46.703, 131_072),
        (QWEN3_235B, 235.094, 192_512),
        (DEEPSEEK_V3, 671.026, 70_272),
        (GEMMA2_9B, 9.242, 344_064),
        (BGE_LARGE, 0.326, 0),
    ],
    ids=lambda value: value["model_type"] if isinstance(value, dict) else "",
)
def test_parameters_and_cache_agree_with_the_published_models(
    config: dict[str, Any], billions: float, kv_bytes: int
) -> None:
    facts = facts_from_config(config, weight_file_bytes=None)
    assert round(facts.parameters / 1e9, 3) == billions
    assert facts.kv_bytes_per_token == kv_bytes
    assert facts.encoder_only is (kv_bytes == 0)


def test_an_unknown_architecture_is_refused_with_the_known_ones() -> None:
    with pytest.raises(InvalidArgument) as caught:
        facts_from_config({"model_type": "mamba"}, weight_file_bytes=None)
    assert caught.value.violations[0].field == "model"
    assert "mamba" in caught.value.message
    assert all(each in caught.value.message for each in SUPPORTED_MODEL_TYPES)


def test_a_config_without_architecture_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="without `model_type`"):
        facts_from_config({}, weight_file_bytes=None)


@pytest.mark.parametrize("key", ["num_hidden_layers", "hidden_size", "vocab_size", "intermediate_size"])
def test_a_missing_key_is_named(key: str) -> None:
    config = decoder("llama", **dimensions(2, 256, 4, 2, 64, 512, 1000))
    del config[key]
    with pytest.raises(InvalidArgument, match=f"`{key}`"):
        facts_from_config(config, weight_file_bytes=None)


@pytest.mark.parametrize("value", ["two", -1, 2.5, True, 1 << 40, 0])
def test_a_wrong_value_is_named(value: object) -> None:
    config = decoder("llama", **dimensions(2, 256, 4, 2, 64, 512, 1000)) | {"num_hidden_layers": value}
    with pytest.raises(InvalidArgument, match="`num_hidden_layers`"):
        facts_from_config(config, weight_file_bytes=None)


def test_stored_quantization_is_read() -> None:
    config = decoder("llama", **dimensions(2, 256, 4, 2, 64, 512, 1000))
    awq = config | {"quantization_config": {"quant_method": "awq", "group_size": 64}}
    facts = facts_from_config(awq, weight_file_bytes=1)
    assert (facts.quantization, facts.quantization_group) == (Quantization.AWQ, 64)
    blocks = config | {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
    facts = facts_from_config(blocks, weight_file_bytes=1)
    assert (facts.quantization, facts.quantization_group) == (Quantization.FP8, 128)


@pytest.mark.parametrize(
    ("scaling", "expected"),
    [
        (None, 32768),
        ({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}, 131072),
        ({"rope_type": "linear", "factor": 2}, 65536),
        ({"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192}, 32768),
    ],
)
def test_rotary_scaling_stretches_the_context(scaling: object, expected: int) -> None:
    config = decoder("llama", **dimensions(2, 256, 4, 2, 64, 512, 1000)) | {"rope_scaling": scaling}
    assert facts_from_config(config, weight_file_bytes=None).max_positions == expected
