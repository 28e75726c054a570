"""Sizing of a declared model on real GPU names, with the hub out of reach."""

import pytest
from huggingface_hub import constants
from millrace.core.v1 import deployment_pb2, node_pb2, types_pb2
from millrace.state.v1 import records_pb2

from controlplane.api import models
from controlplane.api.models import FileModelSource
from controlplane.api.sizer import Sizer
from controlplane.knowledge import load_knowledge
from core.errors import FailedPrecondition, InvalidArgument
from core.store import Put, keys
from deploy.local.options import BUNDLED_MODEL
from tests.support.api_harness import ApiHarness, running_api


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(models, "try_to_load_from_cache", lambda _model, _file: None)


async def add_a100s(harness: ApiHarness) -> None:
    inventory = node_pb2.NodeInventory(
        node="gpu-1",
        devices=[
            node_pb2.Device(
                id=f"GPU-{index}",
                kind=types_pb2.DEVICE_KIND_NVIDIA,
                product="NVIDIA A100-SXM4-80GB",
                memory_bytes=80 << 30,
            )
            for index in range(8)
        ],
        engines=[
            node_pb2.EngineEnvironment(
                engine=types_pb2.ENGINE_VLLM, device_kinds=[types_pb2.DEVICE_KIND_NVIDIA]
            )
        ],
    )
    record = records_pb2.NodeObservationRecord(inventory=inventory, state=types_pb2.NODE_STATE_READY)
    commit = await harness.store.commit([Put(keys.actual_node("gpu-1"), record.SerializeToString())])
    await harness.view.machines.wait_for_revision(commit.revision, 5)


def spec(model: str, quantization: types_pb2.Quantization.ValueType) -> deployment_pb2.DeploymentSpec:
    return deployment_pb2.DeploymentSpec(
        engine=types_pb2.ENGINE_VLLM, model=model, quantization=quantization, replicas=1
    )


async def test_a_known_model_is_sized_without_the_hub() -> None:
    knowledge = load_knowledge()
    async with running_api() as harness:
        await add_a100s(harness)
        sizer = Sizer(harness.view, FileModelSource(knowledge), knowledge)
        sizing = await sizer.size(
            spec("Qwen/Qwen2.5-72B-Instruct", types_pb2.QUANTIZATION_NONE), "models[0]."
        )
        assert (sizing.device_count, sizing.tensor_parallel, sizing.max_model_len) == (2, 2, 15360)
        assert sizing.parameters == 72_706_203_648
        assert "of 147.2 GiB usable on 2x A100-80: fits with tp=2" in sizing.summary
        assert "shortened from 32768 to 15360" in sizing.summary


async def test_deepseek_is_refused_with_the_numbers() -> None:
    knowledge = load_knowledge()
    async with running_api() as harness:
        await add_a100s(harness)
        sizer = Sizer(harness.view, FileModelSource(knowledge), knowledge)
        with pytest.raises(FailedPrecondition, match=r"models\[0\]\.model.*626\.8 GiB"):
            await sizer.size(spec("deepseek-ai/DeepSeek-V3", types_pb2.QUANTIZATION_FP8), "models[0].")


async def test_a_directory_without_quantized_files_is_not_taken_for_awq() -> None:
    knowledge = load_knowledge()
    async with running_api() as harness:
        sizer = Sizer(harness.view, FileModelSource(knowledge), knowledge)
        with pytest.raises(InvalidArgument) as refused:
            await sizer.size(spec(str(BUNDLED_MODEL), types_pb2.QUANTIZATION_AWQ), "models[0].")
    assert refused.value.violations[0].field == "models[0].quantization"
    assert "leave quantization out" in refused.value.message


@pytest.mark.parametrize(
    ("declared", "quantization", "checkpoint"),
    [
        ("Qwen/Qwen2.5-72B-Instruct", types_pb2.QUANTIZATION_AWQ, "Qwen/Qwen2.5-72B-Instruct-AWQ"),
        ("Qwen/Qwen2.5-72B-Instruct", types_pb2.QUANTIZATION_GPTQ, "Qwen/Qwen2.5-72B-Instruct-GPTQ-Int4"),
        ("Qwen/Qwen2.5-72B-Instruct-AWQ", types_pb2.QUANTIZATION_AWQ, ""),
        ("Qwen/Qwen2.5-72B-Instruct", types_pb2.QUANTIZATION_NONE, ""),
    ],
)
async def test_a_quantization_made_beforehand_is_started_from_its_own_repository(
    declared: str, quantization: types_pb2.Quantization.ValueType, checkpoint: str
) -> None:
    knowledge = load_knowledge()
    async with running_api() as harness:
        await add_a100s(harness)
        sizer = Sizer(harness.view, FileModelSource(knowledge), knowledge)
        sizing = await sizer.size(spec(declared, quantization), "models[0].")
    assert sizing.launch_model == checkpoint


async def test_a_base_model_is_not_taken_for_the_instruction_tuned_one() -> None:
    knowledge = load_knowledge()
    async with running_api() as harness:
        await add_a100s(harness)
        sizer = Sizer(harness.view, FileModelSource(knowledge), knowledge)
        with pytest.raises(InvalidArgument, match="AWQ checkpoint"):
            await sizer.size(spec("Qwen/Qwen2.5-72B", types_pb2.QUANTIZATION_AWQ), "models[0].")
