"""vLLM 0.32's metric families, filled from what the engine model did.

In: step outcomes and the model's gauges after a step or an abort. Out: the text of GET /metrics.
Gauges move at the end of a step, so they lag by one step as in vLLM. A request that its client
abandons enters neither `request_success` nor the latency histograms.
Must not: ask the model for anything between steps, or decide anything.
"""

import time
from collections.abc import Callable, Sequence
from typing import Final

from nodeagent.engines.simulator.engine_model import EngineModel, StepOutcome
from nodeagent.engines.simulator.engine_model import Sequence as EngineSequence
from nodeagent.engines.simulator.exposition import Child, Family, Histogram, one_two_five, render
from nodeagent.engines.simulator.settings import EngineLimits, SimulatorSettings

# The bucket bounds are vLLM 0.32's; scrapers must read them from `le`, tests compare them.
_FIRST_TOKEN_BOUNDS: Final = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560),
)
_TOKEN_BOUNDS: Final = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75),
    *(1, 2.5, 5, 7.5, 10, 20, 40, 80),
)
_REQUEST_BOUNDS: Final = (
    *(0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60),
    *(120, 240, 480, 960, 1920, 7680),
)
_ITERATION_BOUNDS: Final = tuple(float(2**power) for power in (0, *range(3, 15)))
_PREEMPTION_BOUNDS: Final = (1, 2, 3, 4, 5, 10, 20)
_N_BOUNDS: Final = (1, 2, 5, 10, 20)
# vLLM never forgets a label set of lora_requests_info; a test that runs for days must be able to.
_ADAPTER_SERIES_MAX: Final = 1024


def _cache_configuration(limits: EngineLimits, rank: int) -> dict[str, str]:
    size_tokens = limits.block_count * limits.block_size_tokens
    concurrency = size_tokens / limits.max_model_length_tokens
    return {
        "block_size": str(limits.block_size_tokens),
        "cache_dtype": "auto",
        "enable_prefix_caching": str(limits.prefix_caching),
        "engine": str(rank),
        "gpu_memory_utilization": "0.92",
        "hash_block_size": "None",
        "kv_cache_max_concurrency": str(concurrency),
        "kv_cache_memory_bytes": "None",
        "kv_cache_size_tokens": str(size_tokens),
        "num_cpu_blocks": "None",
        "num_gpu_blocks": str(limits.block_count),
        "num_gpu_blocks_override": str(limits.block_count),
        "prefix_caching_hash_algo": "sha256",
        "sliding_window": "None",
    }


class SharedMetrics:
    """The families without an `engine` label, which all data-parallel ranks fill together."""

    def __init__(
        self,
        settings: SimulatorSettings,
        created_seconds: float,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._clock = clock
        self.created_seconds = created_seconds
        start = Family("process_start_time_seconds", "gauge", "Unix time of the process's start.")
        start.child({}).set(created_seconds)
        rejections = Family("vllm:admission_rejections", "counter", "Requests refused at once.")
        labels = {"model_name": settings.metric_model_name}
        self._rejections = {
            reason: rejections.child({**labels, "reason": reason})
            for reason in ("max_num_queued_reqs", "max_num_queued_tokens")
        }
        self.families: list[Family | Histogram] = [start, rejections]
        self._adapters: Family | None = None
        self._max_adapters = str(settings.limits.max_running_adapters)
        if settings.enable_lora:
            self._adapters = Family("vllm:lora_requests_info", "gauge", "Running stats on lora requests.")
            self.families.append(self._adapters)

    def record_rejection(self, reason: str) -> None:
        """Counts a request that was refused because a queue is full."""
        self._rejections[reason].add()

    def record_adapters(self, model: EngineModel) -> None:
        """Notes which adapters run and wait; as in vLLM, label sets of the past stay as they were."""
        if self._adapters is None:
            return
        running, waiting = model.adapters()
        labels = {
            "max_lora": self._max_adapters,
            "running_lora_adapters": ",".join(sorted(running)),
            "waiting_lora_adapters": ",".join(sorted(waiting)),
        }
        self._adapters.child(labels).set(self._clock())
        self._adapters.keep_newest(_ADAPTER_SERIES_MAX)


class EngineMetrics:
    """All families of one engine, or of one of its data-parallel ranks."""

    def __init__(
        self,
        settings: SimulatorSettings,
        created_seconds: float,
        *,
        rank: int = 0,
        shared: SharedMetrics | None = None,
    ) -> None:
        self.shared = shared if shared is not None else SharedMetrics(settings, created_seconds)
        self._labels = {"engine": str(rank), "model_name": settings.metric_model_name}
        self._families: list[Family | Histogram] = []
        self._add_gauges(settings, rank)
        self._add_counters()
        self._add_histograms(settings.limits.max_model_length_tokens)

    def _child(self, name: str, kind: str, help_text: str) -> Child:
        return self._labelled(name, kind, help_text, "", ("",))[""]

    def _labelled(
        self, name: str, kind: str, help_text: str, label: str, values: tuple[str, ...]
    ) -> dict[str, Child]:
        family = Family(f"vllm:{name}", kind, help_text)
        self._families.append(family)
        children = {}
        for value in values:
            extra = {label: value} if label else {}
            children[value] = family.child({**self._labels, **extra})
        return children

    def _histogram(self, name: str, help_text: str, bounds: tuple[float, ...]) -> Histogram:
        histogram = Histogram(f"vllm:{name}", help_text, bounds, self._labels)
        self._families.append(histogram)
        return histogram

    def _add_gauges(self, settings: SimulatorSettings, rank: int) -> None:
        self._running = self._child("num_requests_running", "gauge", "Requests in the batch.")
        self._waiting = self._child("num_requests_waiting", "gauge", "Requests in the queue.")
        self._waiting_by_reason = self._labelled(
            "num_requests_waiting_by_reason",
            "gauge",
            "Requests in the queue by reason.",
            "reason",
            ("capacity", "deferred"),
        )
        self._sleep_states = self._labelled(
            "engine_sleep_state",
            "gauge",
            "1 for the state the engine is in.",
            "sleep_state",
            ("awake", "weights_offloaded", "discard_all"),
        )
        self._sleep_states["awake"].set(1)
        self._usage = self._child(
            "kv_cache_usage_perc", "gauge", "KV-cache usage. 1 means 100 percent usage."
        )
        information = Family("vllm:cache_config_info", "gauge", "The cache's configuration.")
        information.child(_cache_configuration(settings.limits, rank)).set(1)
        self._families.append(information)

    def _add_counters(self) -> None:
        def counter(name: str, help_text: str) -> Child:
            return self._child(name, "counter", help_text)

        self._queries = counter("prefix_cache_queries", "Tokens looked up in the prefix cache.")
        self._hits = counter("prefix_cache_hits", "Tokens found in the prefix cache.")
        counter("external_prefix_cache_queries", "Tokens looked up in an external cache.")
        counter("external_prefix_cache_hits", "Tokens found in an external cache.")
        self._preemptions = counter("num_preemptions", "Preemptions.")
        self._prompt_tokens = counter("prompt_tokens", "Prompt tokens processed.")
        self._prompt_by_source = self._labelled(
            "prompt_tokens_by_source",
            "counter",
            "Prompt tokens by source.",
            "source",
            ("local_compute", "local_cache_hit", "external_kv_transfer"),
        )
        self._prompt_cached = counter("prompt_tokens_cached", "Prompt tokens from a cache.")
        self._cached_by_source = self._labelled(
            "prompt_tokens_cached_by_source",
            "counter",
            "Prompt tokens from a cache, by its tier.",
            "source",
            ("device", "host", "p2p", "disk", "external_unspecified"),
        )
        self._generation_tokens = counter("generation_tokens", "Tokens generated.")
        self._success = self._labelled(
            "request_success",
            "counter",
            "Requests that ended, by reason.",
            "finished_reason",
            ("stop", "length", "abort", "error", "repetition"),
        )

    def _add_histograms(self, max_model_length_tokens: int) -> None:
        sizes = tuple(one_two_five(max_model_length_tokens))
        add = self._histogram
        self._request_prompt = add("request_prompt_tokens", "Prompt tokens.", sizes)
        self._request_generation = add("request_generation_tokens", "Generated tokens.", sizes)
        self._iteration = add("iteration_tokens_total", "Tokens of a step.", _ITERATION_BOUNDS)
        self._max_generation = add(
            "request_max_num_generation_tokens", "Most tokens a request may generate.", sizes
        )
        self._params_n = add("request_params_n", "The parameter n.", _N_BOUNDS)
        self._params_max = add("request_params_max_tokens", "The parameter max_tokens.", sizes)
        self._first_token = add("time_to_first_token_seconds", "Time to first token.", _FIRST_TOKEN_BOUNDS)
        self._inter_token = add("inter_token_latency_seconds", "Time between tokens.", _TOKEN_BOUNDS)
        self._per_output = add(
            "request_time_per_output_token_seconds",
            "Mean time per output token of a request.",
            _TOKEN_BOUNDS,
        )
        self._end_to_end = add("e2e_request_latency_seconds", "Whole request.", _REQUEST_BOUNDS)
        self._queue = add("request_queue_time_seconds", "Time in the queue.", _REQUEST_BOUNDS)
        self._inference = add("request_inference_time_seconds", "Time in the batch.", _REQUEST_BOUNDS)
        self._prefill = add("request_prefill_time_seconds", "Time of the prompt.", _REQUEST_BOUNDS)
        self._decode = add("request_decode_time_seconds", "Time of the output.", _REQUEST_BOUNDS)
        self._request_preemptions = add(
            "request_num_preemptions", "Preemptions of a request.", _PREEMPTION_BOUNDS
        )
        self._prefill_computed = add("request_prefill_kv_computed_tokens", "Prompt tokens not cached.", sizes)

    def record_state(self, model: EngineModel) -> None:
        """Sets the gauges and the model's own totals."""
        self._running.set(model.running_count)
        self._waiting.set(model.waiting_count)
        deferred = model.deferred_count
        self._waiting_by_reason["capacity"].set(model.waiting_count - deferred)
        self._waiting_by_reason["deferred"].set(deferred)
        self._usage.set(model.pool.usage_fraction)
        self._queries.set(model.counters.prefix_queries_tokens)
        self._hits.set(model.counters.prefix_hits_tokens)
        self._preemptions.set(model.counters.preemptions)
        self.shared.record_adapters(model)

    def record_sleep(self, level: int | None) -> None:
        """Shows how deep the engine sleeps; None while it is awake."""
        names = {None: "awake", 1: "weights_offloaded", 2: "discard_all"}
        for name, state in self._sleep_states.items():
            state.set(float(name == names.get(level, "")))

    def record_step(self, outcome: StepOutcome, model: EngineModel) -> None:
        """Counts a finished step."""
        for emission in outcome.emissions:
            if emission.is_first:
                self._first_token.observe(emission.gap_seconds)
                self._record_prompt(emission.sequence)
            else:
                self._inter_token.observe(emission.gap_seconds)
        self._generation_tokens.add(len(outcome.emissions))
        self._iteration.observe(outcome.computed_tokens)
        for sequence in outcome.finished:
            self._record_finished(sequence)
        self.record_state(model)

    def _record_prompt(self, sequence: EngineSequence) -> None:
        prompt_tokens = len(sequence.request.prompt_token_ids)
        cached = sequence.cached_tokens
        self._prompt_tokens.add(prompt_tokens)
        self._prompt_by_source["local_compute"].add(prompt_tokens - cached)
        self._prompt_by_source["local_cache_hit"].add(cached)
        self._prompt_cached.add(cached)
        self._cached_by_source["device"].add(cached)

    def _record_finished(self, sequence: EngineSequence) -> None:
        request = sequence.request
        admitted = sequence.admitted_seconds
        first = sequence.first_token_seconds
        last = sequence.last_token_seconds
        if admitted is None or first is None or last is None:
            raise ValueError("a sequence that never ran cannot have finished")
        prompt_tokens = len(request.prompt_token_ids)
        self._success[request.finish_reason].add()
        self._request_prompt.observe(prompt_tokens)
        self._request_generation.observe(sequence.emitted_tokens)
        self._max_generation.observe(request.output_tokens)
        self._params_n.observe(1)
        if request.max_tokens is not None:
            self._params_max.observe(request.max_tokens)
        if sequence.emitted_tokens > 1:
            self._per_output.observe((last - first) / (sequence.emitted_tokens - 1))
        self._end_to_end.observe(last - sequence.arrival_seconds)
        self._queue.observe(admitted - sequence.arrival_seconds)
        self._inference.observe(last - admitted)
        self._prefill.observe(first - admitted)
        self._decode.observe(last - first)
        self._request_preemptions.observe(sequence.preemptions)
        self._prefill_computed.observe(prompt_tokens - sequence.cached_tokens)

    def render(self) -> bytes:
        """The text of GET /metrics for an engine with one rank."""
        return render_metrics([self])


def render_metrics(ranks: Sequence[EngineMetrics]) -> bytes:
    """The text of GET /metrics: one series a rank, and the families that they share once."""
    shared = ranks[0].shared
    own = render([rank._families for rank in ranks], shared.created_seconds)  # noqa: SLF001 - same module
    return own + render([shared.families], shared.created_seconds)
