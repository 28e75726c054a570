"""What vLLM says it took for its start: weights, cache and graphs.

In come the engine's log and metrics page, out come bytes over all devices of the replica. The log's wording
is vLLM 0.32's (`vllm/v1/worker/gpu_worker.py`, `gpu_model_runner.py`, `cpu_worker.py`); a version that words
it otherwise leaves a field unset. Nothing is guessed here.
"""

import re

from millrace.core.v1 import replica_pb2

from nodeagent.engines.metrics_text import VLLM_NAMES, cache_memory_bytes

_GIB = 1024**3
_NUMBER = r"([0-9]+(?:\.[0-9]+)?)"
# Each worker writes its own line, and they differ by less than a per cent: the largest is taken for each.
_WEIGHTS = re.compile(rf"Model loading took {_NUMBER} GiB")
_CACHE = re.compile(rf"Available KV cache memory: {_NUMBER} GiB")
_GRAPHS = re.compile(rf"Graph capturing finished in \d+ secs, took {_NUMBER} GiB")


def read_start(log: str, metrics: str, *, tensor_parallel: int) -> replica_pb2.EngineFacts:
    """Reads what a start took.

    Args:
        log: The engine's log up to its readiness.
        metrics: Its metrics page.
        tensor_parallel: Devices of the replica; the log speaks of one.

    Returns:
        Weights, cache and graphs, as far as they are told.
    """
    facts = replica_pb2.EngineFacts()
    weights, cache, graphs = (_largest(pattern, log) for pattern in (_WEIGHTS, _CACHE, _GRAPHS))
    if weights is not None:
        facts.weights_bytes = weights * tensor_parallel
    if graphs is not None:
        facts.graph_bytes = graphs
    # A cache whose size was ordered is exact in the metrics; the log rounds to 10 MiB.
    ordered = cache_memory_bytes(metrics, VLLM_NAMES)
    if ordered is not None:
        facts.kv_cache_bytes = ordered * tensor_parallel
    elif cache is not None:
        facts.kv_cache_bytes = cache * tensor_parallel
    return facts


def _largest(pattern: re.Pattern[str], log: str) -> int | None:
    found = [float(each) for each in pattern.findall(log)]
    return round(max(found) * _GIB) if found else None
