"""What was measured corrects what is worked out, within what can be believed."""

from dataclasses import replace
from typing import Any

import pytest

from controlplane.sizing import Calibration, DeviceOption, SizingRequest, SizingResult, size
from controlplane.sizing.calibration import cache_scale, calibrated_weights
from controlplane.sizing.units import GIB
from core.states import DeviceKind, Engine
from tests.unit.controlplane.sizing.test_size import llama_70b, tiny

A100 = DeviceOption(DeviceKind.NVIDIA, memory_bytes=80 * GIB, count=4, product="A100-80")
CPU = DeviceOption(DeviceKind.CPU, memory_bytes=16 * GIB, product="a processor")


def measured(**fields: Any) -> Calibration:
    base = Calibration(product="A100-80", engine_version="0.32.0", tensor_parallel=2, max_model_len=8192)
    return replace(base, **fields)


def sized(*calibrations: Calibration, device: DeviceOption = A100) -> SizingResult:
    facts = llama_70b() if device is A100 else tiny()
    request = SizingRequest(Engine.VLLM, facts=facts, max_model_len=1024, calibrations=calibrations)
    return size(request, [device])


def test_measured_weights_take_the_place_of_the_formula_and_say_so() -> None:
    before = sized()
    after = sized(measured(weights_bytes=before.weights_bytes + GIB))
    assert after.weights_bytes == before.weights_bytes + GIB
    assert after.total_bytes == before.total_bytes + GIB
    assert "measured on vLLM 0.32.0" in next(
        each.explanation for each in after.terms if each.name == "weights"
    )


def test_a_measured_overhead_is_what_is_left_of_the_claim_a_device() -> None:
    before = sized()
    besides = before.weights_bytes + 2 * 5 * GIB
    after = sized(measured(besides_cache_bytes=besides))
    assert after.overhead_bytes == 5 * GIB
    assert "as measured" in next(each.explanation for each in after.terms if each.name == "overhead")


def test_tokens_that_the_engine_counted_correct_the_cache_of_a_sequence() -> None:
    before = sized()
    tokens = before.kv_cache_bytes // before.kv_bytes_per_token
    counted = measured(kv_cache_bytes=before.kv_cache_bytes, kv_cache_tokens=tokens * 4 // 5)
    after = sized(counted)
    assert after.kv_cache_bytes == pytest.approx(before.kv_cache_bytes * 5 / 4, rel=0.001)
    assert after.kv_cache_tokens == pytest.approx(before.kv_cache_tokens, rel=0.001)


def test_another_kind_of_device_is_not_corrected() -> None:
    other = replace(measured(weights_bytes=120 * GIB), product="L40S")
    assert sized(other) == sized()


def test_what_the_user_sets_by_hand_wins() -> None:
    request = SizingRequest(
        Engine.VLLM,
        facts=llama_70b(),
        extra_args={"sizing_weights_bytes": 100 * GIB},
        calibrations=(measured(weights_bytes=120 * GIB),),
    )
    assert size(request, [A100]).weights_bytes == 100 * GIB


@pytest.mark.parametrize("factor", [0.3, 3.0])
def test_a_measurement_far_from_the_formula_is_not_believed(factor: float) -> None:
    computed = 100 * GIB
    assert calibrated_weights(computed, measured(weights_bytes=int(computed * factor))) is None
    far = measured(kv_cache_bytes=int(computed * factor), kv_cache_tokens=8192)
    assert cache_scale(computed, far) == 1.0


def test_memory_after_a_start_corrects_a_cpu_share_upward_only() -> None:
    usual = sized(device=CPU)
    on_cpu = replace(measured(), product="a processor", tensor_parallel=1)
    low = replace(on_cpu, besides_cache_bytes=usual.weights_bytes + GIB)
    high = replace(on_cpu, besides_cache_bytes=usual.weights_bytes + 4 * GIB)
    assert sized(low, device=CPU).overhead_bytes == usual.overhead_bytes
    assert sized(high, device=CPU).overhead_bytes == 4 * GIB
