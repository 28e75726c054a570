"""The knowledge base against what others counted: parameters, cache, tensor-parallel degrees, tokens left."""

import pytest

from controlplane.knowledge import load_knowledge
from controlplane.sizing import DeviceOption, ModelFacts, SizingRequest, knowledge_from_data, survey
from controlplane.sizing.fit import parallel_refusal, sequence_bytes
from controlplane.sizing.size import checked_demand
from core.states import DeviceKind, Engine, Quantization

GIB = 1 << 30

# Counted by `transformers` 5.19 on the meta device from the same configurations; DeepSeek-V3 with the 14,848
# corrections of its routers, which are a buffer there and stored with the weights.
EXAMPLES = {
    "Qwen2.5-7B": (7_615_616_512, 57_344, {1, 2, 4}),
    "Qwen2.5-32B": (32_763_876_352, 262_144, {1, 2, 4, 8}),
    "Qwen2.5-72B": (72_706_203_648, 327_680, {1, 2, 4, 8, 16}),
    "Qwen3-8B": (8_190_735_360, 147_456, {1, 2, 4, 8, 16}),
    "Qwen3-32B": (32_762_123_264, 262_144, {1, 2, 4, 8, 16}),
    "Qwen3-235B-A22B": (235_093_634_560, 192_512, {1, 2, 4, 8, 16}),
    "Llama-3.1-8B": (8_030_261_248, 131_072, {1, 2, 4, 8, 16}),
    "Llama-3.1-70B": (70_553_706_496, 327_680, {1, 2, 4, 8, 16}),
    "Llama-3.1-405B": (405_853_388_800, 516_096, {1, 2, 4, 8, 16}),
    "Mistral-7B-v0.3": (7_248_023_552, 131_072, {1, 2, 4, 8, 16}),
    "Mixtral-8x7B": (46_702_792_704, 131_072, {1, 2, 4, 8, 16}),
    "DeepSeek-V3": (671_026_404_352 + 14_848, 70_272, {1, 2, 4, 8, 16}),
    "Gemma-2-9b": (9_241_705_984, 344_064, {1, 2, 4, 8, 16}),
    "Gemma-2-27b": (27_227_128_320, 376_832, {1, 2, 4, 8, 16}),
    "bge-large-zh-v1.5": (325_522_432, 0, {1, 2, 4, 8, 16}),
}
OTHERS = {
    "bge-base-zh-v1.5": 102_267_648,
    "bge-large-en-v1.5": 335_141_888,
    "bge-base-en-v1.5": 109_482_240,
    "bge-m3": 567_754_752,
    "Gemma-2-2b": 2_614_341_888,
    "Gemma-3-1b": 999_885_952,
    "Llama-3.2-1B": 1_235_814_400,
    "Llama-3.2-3B": 3_212_749_824,
    "Mistral-7B-v0.1": 7_241_732_096,
    "Mixtral-8x22B": 140_630_071_296,
    "Qwen2.5-0.5B": 494_032_768,
    "Qwen2.5-1.5B": 1_543_714_304,
    "Qwen2.5-3B": 3_085_938_688,
    "Qwen2.5-14B": 14_770_033_664,
    "Qwen3-0.6B": 596_049_920,
    "Qwen3-1.7B": 1_720_574_976,
    "Qwen3-4B": 4_022_468_096,
    "Qwen3-14B": 14_768_307_200,
    "Qwen3-30B-A3B": 30_532_122_624,
    "Qwen3-Next-80B-A3B": 79_674_391_296,
    "DeepSeek-R1-Distill-Qwen-7B": 7_615_616_512,
    "DeepSeek-R1-Distill-Qwen-32B": 32_763_876_352,
    "DeepSeek-R1-Distill-Llama-70B": 70_553_706_496,
}


def facts(name: str) -> ModelFacts:
    known = load_knowledge().model(name)
    assert known is not None, name
    return known.facts


def degrees(name: str, quantization: Quantization = Quantization.NONE) -> set[int]:
    return {each for each in (1, 2, 4, 8, 16) if not parallel_refusal(facts(name), each, quantization)}


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_fifteen_examples_to_the_last_parameter(name: str) -> None:
    parameters, kv_bytes, parallel = EXAMPLES[name]
    assert facts(name).parameters == parameters
    assert facts(name).kv_bytes_per_token == kv_bytes
    # DeepSeek-V3 is published in blocks of 128 only, of which 16 devices still get whole ones.
    assert degrees(name) == parallel


def test_every_other_model_of_the_knowledge_base_to_the_last_parameter() -> None:
    names = {known.name for known in load_knowledge().models.values()}
    assert names == set(EXAMPLES) | set(OTHERS)
    assert {name: facts(name).parameters for name in OTHERS} == OTHERS


@pytest.mark.parametrize(
    ("name", "quantization", "gibibytes"),
    [
        ("Qwen2.5-7B", Quantization.NONE, 14.2),
        ("Qwen2.5-7B", Quantization.FP8, 8.1),
        ("Qwen2.5-7B", Quantization.AWQ, 5.2),
        ("Qwen2.5-32B", Quantization.GPTQ, 18.0),
        ("Qwen2.5-72B", Quantization.NONE, 135.4),
        ("Qwen2.5-72B", Quantization.FP8, 70.0),
        ("Qwen2.5-72B", Quantization.AWQ, 38.6),
        ("Qwen3-235B-A22B", Quantization.FP8, 220.2),
        ("Llama-3.1-8B", Quantization.AWQ, 5.3),
        ("Llama-3.1-70B", Quantization.AWQ, 37.0),
        ("Llama-3.1-405B", Quantization.FP8, 382.0),
        ("Mixtral-8x7B", Quantization.AWQ, 23.0),
        ("DeepSeek-V3", Quantization.FP8, 626.8),
        ("Gemma-2-9b", Quantization.FP8, 9.5),
        ("Gemma-2-27b", Quantization.AWQ, 14.8),
        # In 32 bits, as its files are; engines take the files' own precision for encoders.
        ("bge-large-zh-v1.5", Quantization.NONE, 1.2),
    ],
)
def test_weights_by_quantization(name: str, quantization: Quantization, gibibytes: float) -> None:
    request = SizingRequest(Engine.VLLM, facts(name), quantization=quantization)
    assert round(survey(request, load_knowledge().gpus).weights_bytes / GIB, 1) == gibibytes


@pytest.mark.parametrize(
    ("name", "quantization", "gpu", "count", "tokens"),
    [
        ("Qwen2.5-7B", "NONE", "H100", 1, 1_040_951),
        ("Qwen2.5-7B", "NONE", "H200", 1, 2_087_467),
        ("Qwen2.5-32B", "NONE", "H100", 1, 35_842),
        ("Qwen2.5-32B", "NONE", "H200", 1, 264_767),
        ("Qwen2.5-72B", "NONE", "H100", 4, 470_830),
        ("Qwen2.5-72B", "NONE", "H200", 2, 379_814),
        ("Qwen3-8B", "NONE", "H100", 1, 397_013),
        ("Qwen3-32B", "NONE", "H200", 1, 264_780),
        ("Qwen3-235B-A22B", "NONE", "H100", 8, 335_566),
        ("Qwen3-235B-A22B", "NONE", "H200", 4, 361_290),
        ("Qwen3-235B-A22B", "FP8", "H100", 4, 328_583),
        ("Llama-3.1-8B", "NONE", "H100", 1, 449_089),
        ("Llama-3.1-70B", "NONE", "H100", 2, 26_671),
        ("Llama-3.1-70B", "FP8", "H100", 2, 235_457),
        ("Llama-3.1-405B", "NONE", "H200", 8, 518_843),
        ("Mistral-7B-v0.3", "NONE", "H100", 1, 461_025),
        ("Mixtral-8x7B", "NONE", "H100", 2, 430_614),
        ("Mixtral-8x7B", "NONE", "H200", 1, 316_844),
        ("DeepSeek-V3", "FP8", "H200", 8, 723_009),
        ("Gemma-2-9b", "NONE", "H100", 1, 164_039),
        ("Gemma-2-27b", "NONE", "H200", 1, 213_571),
    ],
)
def test_tokens_left_agree_with_the_reference(
    name: str, quantization: str, gpu: str, count: int, tokens: int
) -> None:
    found = load_knowledge().gpu(gpu)
    assert found is not None
    request = SizingRequest(Engine.VLLM, facts(name), quantization=Quantization[quantization])
    (fit,) = [each for each in survey(request, [found]).fits if each.count == count]
    # The reference leaves the scales of fp8 blocks and a zero point's bits to rounding.
    # It also leaves out the block that the engine adds to a sliding window.
    assert fit.fit.kv_tokens == pytest.approx(tokens, rel=0.0011)


@pytest.mark.parametrize(
    ("name", "count", "published"), [("Qwen3-32B", 2, 307_328), ("Llama-3.1-70B", 4, 461_376)]
)
def test_published_cache_sizes_within_three_percent(name: str, count: int, published: int) -> None:
    h100 = load_knowledge().gpu("H100")
    assert h100 is not None
    request = SizingRequest(Engine.VLLM, facts(name), extra_args={"gpu_memory_utilization": 0.9})
    (fit,) = [each for each in survey(request, [h100]).fits if each.count == count]
    assert fit.fit.kv_tokens == pytest.approx(published, rel=0.03)
    # The reference's own arithmetic, which rounds the weights.
    assert fit.fit.kv_tokens == pytest.approx({2: 308_611, 4: 463_041}[count], rel=0.0001)


def test_int4_groups_limit_tensor_parallelism_and_padding_lifts_the_limit() -> None:
    assert degrees("Qwen/Qwen2.5-72B-Instruct", Quantization.AWQ) == {1}
    padded = facts("Qwen/Qwen2.5-72B-Instruct-AWQ")
    assert padded.feed_forward_widths == (29696,)
    assert (padded.quantization, padded.quantization_group) == (Quantization.AWQ, 128)
    assert degrees("Qwen/Qwen2.5-72B-Instruct-AWQ", Quantization.AWQ) == {1, 2, 4, 8}
    # 1536 over 8 devices is 192: half a block of 128.
    assert degrees("Qwen/Qwen3-235B-A22B-FP8", Quantization.FP8) == {1, 2, 4}


def test_names_are_found_however_they_are_written() -> None:
    knowledge = load_knowledge()
    assert facts("qwen/qwen2.5-72b-instruct") is facts("Qwen2.5-72B")
    assert knowledge.model("nobody/nothing") is None
    a100 = knowledge.gpu("A100-80GB")
    assert a100 is not None
    for name in ("NVIDIA A100 80GB PCIe", "NVIDIA A100-SXM4-80GB", "a100", "A100-80"):
        assert knowledge.gpu(name) is a100
    assert knowledge.gpu("Tesla T4") is knowledge.gpu("T4")
    assert knowledge.gpu("NVIDIA H100 80GB HBM3") is knowledge.gpu("h100")
    assert knowledge.gpu("Voodoo 2") is None


def test_gptq_of_eight_bits_weighs_about_twice_that_of_four() -> None:
    four = survey(
        SizingRequest(Engine.VLLM, facts("Qwen/Qwen2.5-7B-Instruct-GPTQ-Int4")), load_knowledge().gpus
    )
    eight = survey(
        SizingRequest(Engine.VLLM, facts("Qwen/Qwen2.5-7B-Instruct-GPTQ-Int8")), load_knowledge().gpus
    )
    assert round(four.weights_bytes / GIB, 1) == 5.2
    assert round(eight.weights_bytes / GIB, 1) == 8.3


def option(memory_gib: int, product: str = "") -> DeviceOption:
    return DeviceOption(DeviceKind.NVIDIA, memory_gib * GIB, count=8, product=product)


def kept(name: str, tokens: int, device: DeviceOption) -> int:
    demand = checked_demand(SizingRequest(Engine.VLLM, facts(name)), [device])
    return sequence_bytes(demand, device, 1, tokens)


def test_sliding_windows_are_capped() -> None:
    assert facts("Gemma-2-9b").window_elements_per_token * 2 == facts("Gemma-2-9b").kv_elements_per_token
    # Half the layers keep the window and one step's 2048 tokens: 6143, in blocks and one more.
    assert kept("Gemma-2-9b", 8192, option(48)) == 172_032 * 8192 + 172_032 * (6144 + 16)
    # A larger device computes 8192 tokens in a step: nothing is saved at this length. The A100 is excepted.
    assert kept("Gemma-2-9b", 8192, option(80)) == 172_032 * 8192 + 172_032 * (8192 + 16)
    assert kept("Gemma-2-9b", 8192, option(80, "A100-80")) == kept("Gemma-2-9b", 8192, option(48))
    # All layers of the first Mistral have one: long sequences cost no more than the window.
    assert kept("Mistral-7B-v0.1", 32768, option(48)) == 131_072 * (6144 + 16)
    # Five of six layers of Gemma 3, with a narrow window.
    assert (
        facts("Gemma-3-1b").window_elements_per_token * 26 == facts("Gemma-3-1b").kv_elements_per_token * 22
    )


def test_hybrid_models_keep_a_constant_state_a_sequence() -> None:
    hybrid = facts("Qwen3-Next-80B-A3B")
    # 12 of 48 layers attend; the others keep 32 heads of 128 x 128 in 32 bits and the convolution's inputs.
    assert hybrid.kv_bytes_per_token == 12 * 2 * 2 * 256 * 2
    assert (hybrid.state_layers, hybrid.state_bytes) == (36, 32 * 128 * 128 * 4 + 8192 * 3 * 2)
    # Two pages a layer, in blocks of 16 tokens of 2 KiB: 1056 of them hold a state of 1048.
    states = 36 * 2 * 1056 * 2048
    assert kept("Qwen3-Next-80B-A3B", 1000, option(80)) == 1000 * hybrid.kv_bytes_per_token + states


def test_broken_data_is_refused_by_name() -> None:
    gpus: dict[str, object] = {"gpus": []}
    engines: dict[str, object] = {"engines": {}}
    bge = {
        "model_type": "bert",
        "num_hidden_layers": 1,
        "hidden_size": 64,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "vocab_size": 10,
        "max_position_embeddings": 16,
    }
    twice = {
        "models": [{"name": "a", "ids": ["x/a"], "config": bge}, {"name": "b", "ids": ["X/A"], "config": bge}]
    }
    with pytest.raises(ValueError, match="called X/A"):
        knowledge_from_data([twice], gpus, engines)
    with pytest.raises(ValueError, match="no list"):
        knowledge_from_data([{"models": {}}], gpus, engines)
    with pytest.raises(ValueError, match="no object"):
        knowledge_from_data([], gpus, {"engines": []})
