"""Metrics pages into normalised samples: missing is unset, series of several engines are added up."""

from nodeagent.engines.metrics_text import VLLM_NAMES, parse_labels, parse_stats

PAGE = """\
# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="chat"} 2.0
vllm:num_requests_running{engine="1",model_name="chat"} 3.0
vllm:num_requests_waiting{engine="0",model_name="chat"} 1.0
vllm:num_requests_waiting_by_reason{engine="0",model_name="chat",reason="capacity"} 7.0
vllm:kv_cache_usage_perc{engine="0",model_name="chat"} 0.25
vllm:kv_cache_usage_perc{engine="1",model_name="chat"} 0.75
vllm:prefix_cache_queries_total{engine="0",model_name="chat"} 1866.0
vllm:prefix_cache_queries_created{engine="0",model_name="chat"} 1.7952033515692454e+09
vllm:prefix_cache_hits_total{engine="0",model_name="chat"} 768.0
vllm:prompt_tokens_total{engine="0",model_name="chat"} 1.866e+03
vllm:prompt_tokens_created{engine="0",model_name="chat"} 1.7952033515693455e+09
vllm:generation_tokens_total{engine="0",model_name="chat"} 17533.0
vllm:request_success_total{engine="0",finished_reason="stop",model_name="chat"} 20.0
vllm:request_success_total{engine="0",finished_reason="length",model_name="chat"} 24.0
vllm:time_to_first_token_seconds_bucket{engine="0",le="0.001",model_name="chat"} 5.0
vllm:cache_config_info{block_size="128",engine="0",kv_cache_size_tokens="1048576",num_gpu_blocks="8192"} 1.0
vllm:cache_config_info{block_size="128",engine="1",kv_cache_size_tokens="None",num_gpu_blocks="10"} 1.0
"""


def test_vllm_page() -> None:
    stats = parse_stats(PAGE, VLLM_NAMES)
    assert stats.running_requests == 5
    assert stats.waiting_requests == 1
    assert stats.kv_usage_ratio == 0.5
    assert stats.prefix_query_tokens_total == 1866
    assert stats.prefix_hit_tokens_total == 768
    assert stats.prompt_tokens_total == 1866
    assert stats.generation_tokens_total == 17533
    assert stats.succeeded_requests_total == 44
    assert stats.kv_block_tokens == 128
    assert stats.kv_cache_tokens == 1048576 + 1280
    assert not stats.HasField("preemptions_total")


def test_unknown_stays_unknown() -> None:
    for page in ("", "other_metric 1\n", "vllm:num_requests_running\n", "vllm:num_requests_running x\n"):
        stats = parse_stats(page, VLLM_NAMES)
        assert not stats.ListFields()
    assert not parse_stats("vllm:num_requests_running NaN\n", VLLM_NAMES).HasField("running_requests")


def test_zero_is_known() -> None:
    stats = parse_stats('vllm:num_requests_running{engine="0"} 0.0\n', VLLM_NAMES)
    assert stats.HasField("running_requests")
    assert stats.running_requests == 0


def test_labels_with_quotes_and_braces() -> None:
    page = 'vllm:num_requests_running{model_name="a \\"b\\" {c}, d"} 4\n'
    assert parse_stats(page, VLLM_NAMES).running_requests == 4
    assert parse_labels('a="x\\"y",b="1"') == {"a": 'x"y', "b": "1"}


def test_the_latest_label_set_tells_the_adapters() -> None:
    page = """\
vllm:lora_requests_info{max_lora="2",running_lora_adapters="a,b",waiting_lora_adapters="c"} 1.795203351e+09
vllm:lora_requests_info{max_lora="2",running_lora_adapters="b",waiting_lora_adapters=""} 1.795203359e+09
vllm:lora_requests_info{max_lora="2",running_lora_adapters="",waiting_lora_adapters="a"} 1.795203340e+09
"""
    adapters = parse_stats(page, VLLM_NAMES).adapters
    assert (list(adapters.running), list(adapters.waiting), adapters.running_max) == (["b"], [], 2)
    assert not parse_stats(PAGE, VLLM_NAMES).HasField("adapters")
