from typing import Any

import pytest

from controlplane.sizing import DeviceOption, SizingRequest, facts_from_config, size, too_large
from controlplane.sizing.facts import ModelFacts
from core.errors import FailedPrecondition, InvalidArgument
from core.states import DeviceKind, Engine, Quantization

GIB = 1 << 30
MIB = 1 << 20
CPU_NODE = DeviceOption(DeviceKind.CPU, 19 * GIB, node="a")
A100 = DeviceOption(DeviceKind.NVIDIA, 80 * GIB, count=8, node="g", product="NVIDIA A100 80GB PCIe")
L40S = DeviceOption(DeviceKind.NVIDIA, 46068 * MIB, count=1, node="l", product="NVIDIA L40S")


def tiny(**changes: Any) -> ModelFacts:
    config = {
        "model_type": "llama",
        "hidden_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "intermediate_size": 512,
        "vocab_size": 2048,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
        **changes,
    }
    return facts_from_config(config, weight_file_bytes=int(5.8 * MIB))


def llama_70b() -> ModelFacts:
    return facts_from_config(
        {
            "model_type": "llama",
            "hidden_size": 8192,
            "num_hidden_layers": 80,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
            "intermediate_size": 28672,
            "vocab_size": 128256,
            "max_position_embeddings": 131072,
        },
        weight_file_bytes=None,
    )


def vllm(facts: ModelFacts | None, **fields: Any) -> SizingRequest:
    return SizingRequest(engine=Engine.VLLM, facts=facts, **fields)


def test_a_tiny_model_on_cpu_tells_every_term() -> None:
    result = size(vllm(tiny()), [CPU_NODE])
    assert result.device_kinds == (DeviceKind.CPU,)
    assert (result.device_count, result.tensor_parallel, result.max_model_len) == (1, 1, 2048)
    assert result.kv_bytes_per_token == 1024
    assert result.kv_cache_bytes == 64 * MIB
    assert result.overhead_bytes == 3 * GIB
    assert sum(term.bytes for term in result.terms) == result.total_bytes
    assert result.summary == (
        "weights 5.8 MiB + KV cache 64.0 MiB (1 KiB/token x 2048 tokens x 8 sequences, at least 64.0 MiB)"
        " + overhead 3.0 GiB = 3.1 GiB on CPU"
    )


def test_the_cache_on_cpu_has_a_ceiling_unless_one_sequence_needs_more() -> None:
    small = size(vllm(tiny(num_hidden_layers=64, max_position_embeddings=32768)), [CPU_NODE])
    assert small.kv_cache_bytes == 4 * GIB
    large = size(vllm(tiny(num_hidden_layers=128, max_position_embeddings=131072)), [CPU_NODE])
    assert large.max_model_len == 131072
    assert large.kv_cache_bytes > 65536 * 131072


def test_a_context_that_does_not_fit_is_shortened_and_said_so() -> None:
    result = size(vllm(tiny(num_hidden_layers=512, max_position_embeddings=131072)), [CPU_NODE])
    assert 2048 <= result.max_model_len < 131072
    assert result.max_model_len % 1024 == 0
    assert f"shortened from 131072 to {result.max_model_len}" in result.summary
    assert result.total_bytes <= CPU_NODE.memory_bytes


@pytest.mark.parametrize("tokens", [0, -5, 100_000_001, 2049])
def test_a_context_that_cannot_be_meant_names_the_field(tokens: int) -> None:
    with pytest.raises(InvalidArgument) as caught:
        size(vllm(tiny(), max_model_len=tokens), [CPU_NODE])
    assert caught.value.violations[0].field == "max_model_len"


@pytest.mark.parametrize("tokens", [0, "lots", 2049, True, 1.5])
def test_a_wrong_context_in_the_arguments_names_the_argument(tokens: object) -> None:
    with pytest.raises(InvalidArgument) as caught:
        size(vllm(tiny(), extra_args={"max_model_len": tokens}), [CPU_NODE])
    assert caught.value.violations[0].field == "extra_args.max_model_len"


def test_engine_arguments_override_term_by_term() -> None:
    result = size(
        vllm(
            tiny(),
            max_model_len=2048,
            extra_args={"max-model-len": "1k", "kv_cache_memory_bytes": 128 * MIB},
        ),
        [CPU_NODE],
    )
    assert result.max_model_len == 1000
    assert result.kv_cache_bytes == 128 * MIB


def test_a_head_width_that_cpu_attention_refuses() -> None:
    facts = tiny(head_dim=16)
    with pytest.raises(InvalidArgument, match="width 16 cannot run on CPU"):
        size(vllm(facts), [CPU_NODE])
    assert size(vllm(facts), [CPU_NODE, A100]).device_kinds == (DeviceKind.NVIDIA,)


def test_a_gpu_is_preferred_and_the_fewest_are_taken() -> None:
    result = size(vllm(llama_70b()), [CPU_NODE, A100])
    assert result.device_kinds == (DeviceKind.NVIDIA,)
    assert (result.device_count, result.tensor_parallel) == (2, 2)
    assert "shortened" in result.summary
    assert result.overhead_bytes == 7 * GIB // 2
    full = size(vllm(llama_70b(), max_model_len=131072), [A100])
    assert full.device_count == 4
    assert full.tensor_parallel == 4


def test_awq_of_70b_takes_one_a100() -> None:
    result = size(vllm(llama_70b(), quantization=Quantization.AWQ, max_model_len=32768), [A100])
    assert result.device_count == 1


def test_utilization_claims_the_share_of_the_device() -> None:
    result = size(vllm(tiny(), extra_args={"gpu_memory_utilization": 0.5}), [A100])
    assert result.total_bytes == 40 * GIB


def test_an_impossible_tensor_parallel_degree_lists_the_possible() -> None:
    with pytest.raises(InvalidArgument, match="possible are 1, 2, 4") as caught:
        size(vllm(tiny(), extra_args={"tensor_parallel_size": 3}), [A100])
    assert caught.value.violations[0].field == "extra_args.tensor_parallel_size"


def test_what_cannot_fit_is_refused_with_numbers_and_the_cheapest_change() -> None:
    with pytest.raises(FailedPrecondition) as caught:
        size(vllm(llama_70b()), [L40S])
    error = caught.value
    assert error.reason == "ERROR_REASON_MODEL_DOES_NOT_FIT"
    assert error.metadata["field"] == "model"
    assert int(error.metadata["needed_bytes"]) > int(error.metadata["largest_bytes"])
    assert "quantization awq fits" in error.message


def test_a_long_context_that_cannot_fit_suggests_a_shorter_one() -> None:
    request = vllm(tiny(num_hidden_layers=512, max_position_embeddings=131072), max_model_len=131072)
    refusal = too_large(request, [CPU_NODE])
    assert refusal is not None
    assert refusal.needed_bytes > refusal.largest_bytes
    assert refusal.suggestion.startswith("max_model_len ")
    assert too_large(vllm(tiny()), [CPU_NODE]) is None


def test_without_known_devices_nothing_is_refused_for_its_size() -> None:
    result = size(vllm(llama_70b()), [])
    assert result.device_kinds == (DeviceKind.NVIDIA, DeviceKind.CPU)
    assert result.device_count == 1


def test_quantization_that_contradicts_the_files() -> None:
    facts = tiny(quantization_config={"quant_method": "gptq", "group_size": 128})
    with pytest.raises(InvalidArgument, match="GPTQ and cannot be loaded as AWQ"):
        size(vllm(facts, quantization=Quantization.AWQ), [CPU_NODE])


def test_simulator_and_external_need_no_model() -> None:
    simulator = size(SizingRequest(engine=Engine.SIMULATOR), [])
    assert (simulator.total_bytes, simulator.device_count, simulator.max_model_len) == (64 * MIB, 1, 8192)
    external = size(SizingRequest(engine=Engine.EXTERNAL), [CPU_NODE])
    assert (external.total_bytes, external.device_count, external.device_kinds) == (0, 0, ())


def test_an_engine_that_is_not_there_yet_is_refused() -> None:
    with pytest.raises(InvalidArgument) as caught:
        size(SizingRequest(engine=Engine.TGI), [CPU_NODE])
    assert caught.value.violations[0].field == "engine"
