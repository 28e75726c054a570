from prometheus_client.parser import text_string_to_metric_families

from nodeagent.engines.simulator.engine_model import EngineModel, SequenceRequest
from nodeagent.engines.simulator.metrics import EngineMetrics
from nodeagent.engines.simulator.settings import SimulatorSettings

# Families of a vLLM 0.32.0 engine as its /metrics names them, without those of multi-modal
# caches, sleep operations, utilisation estimates and the HTTP instrumentation.
EXPECTED = {
    "counter": {
        "vllm:prefix_cache_queries",
        "vllm:prefix_cache_hits",
        "vllm:external_prefix_cache_queries",
        "vllm:external_prefix_cache_hits",
        "vllm:num_preemptions",
        "vllm:prompt_tokens",
        "vllm:prompt_tokens_by_source",
        "vllm:prompt_tokens_cached",
        "vllm:prompt_tokens_cached_by_source",
        "vllm:generation_tokens",
        "vllm:request_success",
        "vllm:admission_rejections",
    },
    "gauge": {
        "vllm:num_requests_running",
        "vllm:num_requests_waiting",
        "vllm:num_requests_waiting_by_reason",
        "vllm:engine_sleep_state",
        "vllm:kv_cache_usage_perc",
        "vllm:cache_config_info",
        "process_start_time_seconds",
    },
    "histogram": {
        "vllm:request_prompt_tokens",
        "vllm:request_generation_tokens",
        "vllm:iteration_tokens_total",
        "vllm:request_max_num_generation_tokens",
        "vllm:request_params_n",
        "vllm:request_params_max_tokens",
        "vllm:time_to_first_token_seconds",
        "vllm:inter_token_latency_seconds",
        "vllm:request_time_per_output_token_seconds",
        "vllm:e2e_request_latency_seconds",
        "vllm:request_queue_time_seconds",
        "vllm:request_inference_time_seconds",
        "vllm:request_prefill_time_seconds",
        "vllm:request_decode_time_seconds",
        "vllm:request_num_preemptions",
        "vllm:request_prefill_kv_computed_tokens",
    },
}
BOUNDS = {
    "vllm:time_to_first_token_seconds": (
        "0.001 0.005 0.01 0.02 0.04 0.06 0.08 0.1 0.25 0.5 0.75 1.0 2.5 5.0 7.5 10.0 20.0 40.0 "
        "80.0 160.0 640.0 2560.0 +Inf"
    ),
    "vllm:inter_token_latency_seconds": (
        "0.01 0.025 0.05 0.075 0.1 0.15 0.2 0.3 0.4 0.5 0.75 1.0 2.5 5.0 7.5 10.0 20.0 40.0 80.0 +Inf"
    ),
    "vllm:e2e_request_latency_seconds": (
        "0.3 0.5 0.8 1.0 1.5 2.0 2.5 5.0 10.0 15.0 20.0 30.0 40.0 50.0 60.0 120.0 240.0 480.0 "
        "960.0 1920.0 7680.0 +Inf"
    ),
    "vllm:iteration_tokens_total": (
        "1.0 8.0 16.0 32.0 64.0 128.0 256.0 512.0 1024.0 2048.0 4096.0 8192.0 16384.0 +Inf"
    ),
}


def run_two_requests() -> str:
    settings = SimulatorSettings(model="/m", served_model_names=("tiny", "other"))
    metrics = EngineMetrics(settings, 1_700_000_000.0)
    model = EngineModel(settings.limits, settings.timing)
    now_seconds = 0.0
    for _ in range(2):
        model.submit(SequenceRequest([5] * 33, 4, "length", lambda i: i), now_seconds)
        while (step := model.begin_step(now_seconds)) is not None:
            now_seconds += step.duration_seconds
            metrics.record_step(model.finish_step(step, now_seconds), model)
    return metrics.render().decode()


def test_families_and_kinds_are_vllms() -> None:
    found: dict[str, set[str]] = {"counter": set(), "gauge": set(), "histogram": set()}
    for family in text_string_to_metric_families(run_two_requests()):
        if not family.name.endswith("_created"):
            found[family.type].add(family.name)
    assert found == EXPECTED


def test_text_has_help_type_and_sorted_labels() -> None:
    text = run_two_requests()
    labels = '{engine="0",model_name="tiny"}'
    assert "# TYPE vllm:generation_tokens_total counter\n" in text
    assert f"vllm:generation_tokens_total{labels} 8.0\n" in text
    assert "# TYPE vllm:generation_tokens_created gauge\n" in text
    assert f"vllm:generation_tokens_created{labels} 1700000000.0\n" in text
    reason = 'engine="0",finished_reason="length",model_name="tiny"'
    assert f"vllm:request_success_total{{{reason}}} 2.0\n" in text
    bucket = 'engine="0",le="0.3",model_name="tiny"'
    assert f"vllm:e2e_request_latency_seconds_bucket{{{bucket}}} 2.0\n" in text


def test_values_count_what_happened() -> None:
    samples = {
        (sample.name, sample.labels.get("source", "")): sample.value
        for family in text_string_to_metric_families(run_two_requests())
        for sample in family.samples
    }
    assert samples["vllm:prefix_cache_queries_total", ""] == 66
    assert samples["vllm:prefix_cache_hits_total", ""] == 32
    assert samples["vllm:prompt_tokens_by_source_total", "local_compute"] == 34
    assert samples["vllm:prompt_tokens_by_source_total", "local_cache_hit"] == 32
    assert samples["vllm:prompt_tokens_cached_by_source_total", "device"] == 32
    assert samples["vllm:time_to_first_token_seconds_count", ""] == 2
    assert samples["vllm:inter_token_latency_seconds_count", ""] == 6
    assert samples["vllm:kv_cache_usage_perc", ""] == 0
    assert samples["vllm:request_generation_tokens_sum", ""] == 8


def test_bounds_are_vllms() -> None:
    found = {
        family.name: " ".join(s.labels["le"] for s in family.samples if "le" in s.labels)
        for family in text_string_to_metric_families(run_two_requests())
    }
    assert {name: found[name] for name in BOUNDS} == BOUNDS
    assert found["vllm:request_prompt_tokens"].endswith("10000.0 20000.0 +Inf")


def test_cache_information_tells_the_size() -> None:
    families = {family.name: family for family in text_string_to_metric_families(run_two_requests())}
    (sample,) = families["vllm:cache_config_info"].samples
    assert sample.value == 1
    assert sample.labels["block_size"] == "16"
    assert sample.labels["num_gpu_blocks"] == "4096"
    assert sample.labels["kv_cache_size_tokens"] == "65536"
