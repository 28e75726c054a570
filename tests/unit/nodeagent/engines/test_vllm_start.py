"""What vLLM says of its start, in the words of its log."""

from nodeagent.engines.vllm_start import read_start

GIB = 1024**3
LOG = """\
(Worker_TP0 pid=1) INFO Model loading took 14.99 GiB memory and 3.1 seconds
(Worker_TP1 pid=2) INFO Model loading took 14.98 GiB memory and 3.1 seconds
(Worker_TP0 pid=1) INFO Available KV cache memory: 52.25 GiB
(Worker_TP0 pid=1) INFO Graph capturing finished in 20 secs, took 0.53 GiB
"""


def page(ordered: str) -> str:
    return f'vllm:cache_config_info{{block_size="16",kv_cache_memory_bytes="{ordered}"}} 1.0\n'


def test_the_log_speaks_of_one_device_and_the_facts_of_all() -> None:
    facts = read_start(LOG, page("None"), tensor_parallel=2)
    assert facts.weights_bytes == 2 * round(14.99 * GIB)
    assert facts.kv_cache_bytes == 2 * round(52.25 * GIB)
    assert facts.graph_bytes == round(0.53 * GIB)


def test_a_cache_that_was_ordered_is_exact() -> None:
    assert read_start(LOG, page("268435456"), tensor_parallel=1).kv_cache_bytes == 268435456


def test_what_is_not_told_is_not_set() -> None:
    facts = read_start("INFO nothing of the kind", "", tensor_parallel=1)
    assert not facts.ListFields()
