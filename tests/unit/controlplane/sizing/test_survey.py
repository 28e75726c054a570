"""What is recommended, what is refused, and that the API's sizing says the same."""

import pytest

from controlplane.knowledge import load_knowledge
from controlplane.sizing import DeviceOption, GpuModel, ModelFacts, SizingRequest, Survey, size, survey
from core.errors import FailedPrecondition, InvalidArgument
from core.states import DeviceKind, Engine, Quantization

GIB = 1 << 30
REFERENCE = ("A100-80GB", "L40S", "T4")
TABLE = [
    ("Qwen2.5-72B", "NONE", "A100-80GB", 2),
    ("Qwen2.5-72B", "AWQ", "A100-80GB", 1),
    ("Qwen2.5-32B", "NONE", "A100-80GB", 1),
    ("Qwen2.5-32B", "AWQ", "L40S", 1),
    ("Qwen2.5-7B", "NONE", "L40S", 1),
    ("Qwen2.5-7B", "AWQ", "T4", 1),
    ("Llama-3.1-70B", "NONE", "A100-80GB", 2),
    ("Llama-3.1-70B", "AWQ", "A100-80GB", 1),
    ("Llama-3.1-8B", "NONE", "L40S", 1),
    ("Llama-3.1-8B", "AWQ", "T4", 1),
    ("bge-large-zh-v1.5", "NONE", "T4", 1),
]


def facts(name: str) -> ModelFacts:
    known = load_knowledge().model(name)
    assert known is not None, name
    return known.facts


def gpus(*names: str) -> list[GpuModel]:
    found = [load_knowledge().gpu(name) for name in names]
    return [each for each in found if each is not None]


def surveyed(name: str, quantization: str = "NONE", *names: str, **fields: object) -> Survey:
    request = SizingRequest(Engine.VLLM, facts(name), quantization=Quantization[quantization], **fields)  # type: ignore[arg-type]
    known = load_knowledge().gpus
    return survey(request, gpus(*names), known=known) if names else survey(request, known)


def term(answer: Survey, name: str) -> str:
    (found,) = [each.explanation for each in answer.terms if each.name == name]
    return found


@pytest.mark.parametrize("names", [(), REFERENCE], ids=["all GPUs", "named GPUs"])
@pytest.mark.parametrize(("model", "quantization", "gpu", "count"), TABLE)
def test_the_reference_table(
    model: str, quantization: str, gpu: str, count: int, names: tuple[str, ...]
) -> None:
    answer = surveyed(model, quantization, *names)
    best = answer.recommended
    assert best is not None
    assert (best.gpu.name, best.count, best.fit.tensor_parallel) == (gpu, count, count)
    assert not [each for each in answer.terms if each.name == "refused"]
    most = facts(model).max_positions
    assert best.fit.max_model_len == most or f"shortened from {most}" in term(answer, "total")


@pytest.mark.parametrize(("model", "quantization", "gpu", "count"), TABLE)
def test_the_api_recommends_the_same_on_nodes_with_these_gpus(
    model: str, quantization: str, gpu: str, count: int
) -> None:
    request = SizingRequest(Engine.VLLM, facts(model), quantization=Quantization[quantization])
    nodes = [
        DeviceOption(DeviceKind.NVIDIA, each.memory_bytes, count=8, node=each.name, product=each.short_name)
        for each in gpus(*REFERENCE)
    ]
    best = surveyed(model, quantization).recommended
    assert best is not None
    result = size(request, nodes)
    assert (result.device_count, result.max_model_len) == (count, best.fit.max_model_len)
    assert (result.weights_bytes, result.parameters) == (best.fit.weights_bytes, facts(model).parameters)
    assert (
        f"GiB usable on {f'{count}x ' if count > 1 else ''}{gpu.removesuffix('GB')}: fits" in result.summary
    )


def test_the_sum_as_a_sentence() -> None:
    answer = surveyed("Qwen/Qwen2.5-72B-Instruct", "AWQ")
    assert term(answer, "total") == (
        "weights 38.6 GiB + KV 10.0 GiB at 32k x 1 + overhead 3.5 GiB = 52.1 of 73.6 GiB usable on A100-80: "
        "fits with tp=1"
    )
    addends = {each.name: each.bytes for each in answer.terms}
    assert addends["total"] == addends["weights"] + addends["kv_cache"] + addends["overhead"]
    assert term(answer, "launch") == "--tensor-parallel-size 1 --max-model-len 32768 --quantization awq"
    assert "--dtype half" in term(surveyed("Qwen2.5-7B", "AWQ"), "launch")


def test_every_fit_is_listed_with_the_tokens_that_are_left() -> None:
    answer = surveyed("Qwen2.5-72B", "NONE", "A100-80GB", "L40S")
    listed = [(each.gpu.name, each.count, each.fit.max_model_len) for each in answer.fits]
    assert listed == [
        ("A100-80GB", 2, 15360),
        ("A100-80GB", 4, 32768),
        ("A100-80GB", 8, 32768),
        ("L40S", 4, 32768),
        ("L40S", 8, 32768),
    ]
    tokens = [each.fit.kv_tokens for each in answer.fits]
    assert all(each >= found.fit.max_model_len for each, found in zip(tokens, answer.fits, strict=True))


def test_deepseek_is_refused_on_eight_a100_and_what_fits_is_named() -> None:
    for quantization in ("NONE", "FP8"):
        refused = surveyed("DeepSeek-V3", quantization, "A100-80GB")
        assert refused.recommended is None
        assert refused.fits == ()
        assert "weights 626.8 GiB" in refused.why
        assert "of 588.8 GiB usable on 8x A100-80 (640.0 GiB of memory): does not fit" in refused.why
        ways = [each.text for each in refused.alternatives]
        assert ways == [
            "fp8 weights (626.8 GiB) on 8x H200",
            "awq weights (327.2 GiB) on 8x A100-80GB",
        ]
    # Asked about everything, it says what it passed over.
    answer = surveyed("DeepSeek-V3")
    assert answer.recommended is not None
    assert answer.recommended.text == "8x H200"
    assert "8x A100-80" in term(answer, "refused")


def test_a_context_that_does_not_fit_names_the_longest_that_does() -> None:
    answer = surveyed(
        "Llama-3.1-8B", "AWQ", "T4", max_model_len=131072, extra_args={"tensor_parallel_size": 1}
    )
    assert answer.recommended is None
    assert "at 128k x" in answer.why
    assert answer.alternatives[0].text.endswith("on 1x T4 with max_model_len 39936")


def test_a_context_too_short_to_be_useful_is_not_recommended() -> None:
    # 37.0 GiB of weights leave an L40S less than 3000 tokens.
    answer = surveyed("Llama-3.1-70B", "AWQ", "L40S")
    assert (answer.fits[0].count, answer.fits[0].fit.max_model_len < 3000) == (1, True)
    assert answer.recommended is not None
    assert answer.recommended.count == 2


@pytest.mark.parametrize(
    ("argument", "value", "name", "expected"),
    [
        ("sizing_weights_bytes", 40 * GIB, "weights", 40 * GIB),
        ("sizing_overhead_bytes", 2 * GIB, "overhead", 2 * GIB),
        ("max_model_len", 16384, "kv_cache", 5 * GIB),
        ("kv_cache_dtype", "fp8", "kv_cache", 5 * GIB),
    ],
)
def test_every_term_can_be_overridden(argument: str, value: object, name: str, expected: int) -> None:
    answer = surveyed("Qwen2.5-72B", "AWQ", "A100", extra_args={argument: value})
    assert {each.name: each.bytes for each in answer.terms}[name] == expected


def test_the_share_and_the_degree_can_be_overridden() -> None:
    answer = surveyed("Qwen2.5-72B", "NONE", "A100", extra_args={"gpu_memory_utilization": 0.95})
    assert "of 152.0 GiB usable" in term(answer, "total")
    degree = surveyed("Qwen2.5-72B", "NONE", "A100", extra_args={"tensor_parallel_size": 8})
    assert [each.count for each in degree.fits] == [8]
    with pytest.raises(InvalidArgument, match="groups of 128"):
        surveyed("Qwen2.5-72B", "AWQ", "A100", extra_args={"tensor_parallel_size": 2})


def test_the_api_refuses_deepseek_on_eight_a100() -> None:
    request = SizingRequest(Engine.VLLM, facts("DeepSeek-V3"))
    node = DeviceOption(DeviceKind.NVIDIA, 80 * GIB, count=8, node="a", product="A100-80")
    with pytest.raises(FailedPrecondition, match=r"weights 626\.8 GiB") as caught:
        size(request, [node])
    assert "of which an engine can use 92%" in caught.value.message
    assert "together" not in caught.value.message
    assert "`millrace size MODEL` lists the GPUs and quantizations that fit" in caught.value.message


def test_the_refusal_says_that_several_nodes_are_not_one() -> None:
    request = SizingRequest(Engine.VLLM, facts("DeepSeek-V3"))
    nodes = [DeviceOption(DeviceKind.NVIDIA, 80 * GIB, count=8, node=name) for name in ("a", "b")]
    with pytest.raises(FailedPrecondition, match="the 2 nodes have the memory only together"):
        size(request, nodes)
