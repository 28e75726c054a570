"""Settings of one simulator process, as plain frozen values.

In: nothing; `flags.py` builds these from the command line and tests build them by hand.
Out: immutable groups that the engine model, the faults and the HTTP front read.
Must not: parse, read the environment, or import anything heavier than dataclasses, because the
process has to listen within 150 ms of its start.
"""

from dataclasses import dataclass, field

DEFAULT_MAX_MODEL_LENGTH_TOKENS = 32_768


@dataclass(frozen=True)
class EngineLimits:
    """What the engine model may hold at once.

    Attributes:
        max_model_length_tokens: Prompt plus output of one request, in tokens.
        max_running_sequences: Requests in one batch.
        max_batched_tokens: Tokens computed in one step (the size of a prefill chunk).
        block_size_tokens: Tokens in one KV block.
        block_count: KV blocks, the reserved null block included.
        prefix_caching: Whether full blocks are kept for later requests.
        max_running_adapters: Different LoRA adapters in one batch.
        kv_events: Whether what happens to cached blocks is written down.
    """

    max_model_length_tokens: int = DEFAULT_MAX_MODEL_LENGTH_TOKENS
    max_running_sequences: int = 256
    max_batched_tokens: int = 2048
    block_size_tokens: int = 16
    block_count: int = 4096
    prefix_caching: bool = True
    max_running_adapters: int = 1
    kv_events: bool = False

    @property
    def capacity_tokens(self) -> int:
        """Tokens that fit into the usable blocks; one block is the null block, as in vLLM."""
        return (self.block_count - 1) * self.block_size_tokens


@dataclass(frozen=True)
class LoraAdapter:
    """A LoRA adapter: the name that requests use, where it comes from, and the engine's number for it."""

    name: str
    path: str
    number: int


@dataclass(frozen=True)
class KvEventSettings:
    """Where KV events go, with vLLM's names and defaults (`--kv-events-config`).

    Attributes:
        endpoint: Of the PUB socket; it binds where there is a `*` or `::` or for ipc, else it connects.
        replay_endpoint: Of the ROUTER that repeats past batches, None for none.
        buffer_steps: Batches that are kept for replay.
        hwm: Batches that a slow subscriber may lag before it loses some.
        max_queue_size: Only shown; nothing queues here.
        topic: First frame of every message.
        positional: Write events as arrays without names, as engines before vLLM 0.30 did.
    """

    endpoint: str = "tcp://*:5557"
    replay_endpoint: str | None = None
    buffer_steps: int = 10_000
    hwm: int = 100_000
    max_queue_size: int = 100_000
    topic: str = ""
    positional: bool = False


@dataclass(frozen=True)
class StepTiming:
    """How long one step takes.

    Attributes:
        prefill_tokens_per_second: Speed of uncached prompt tokens; 0 means at once.
        inter_token_latency_ms: Cost of a decode step, whatever its batch.
        inter_token_latency_ms_per_sequence: Cost added by every sequence in the batch.
    """

    prefill_tokens_per_second: float = 8000.0
    inter_token_latency_ms: float = 6.0
    inter_token_latency_ms_per_sequence: float = 0.35

    def step_seconds(self, prefill_tokens: int, decode_sequences: int) -> float:
        """Seconds of a step that computes this much."""
        seconds = 0.0
        if prefill_tokens and self.prefill_tokens_per_second > 0:
            seconds += prefill_tokens / self.prefill_tokens_per_second
        if decode_sequences:
            per_sequence_ms = self.inter_token_latency_ms_per_sequence * decode_sequences
            seconds += (self.inter_token_latency_ms + per_sequence_ms) / 1000.0
        return seconds


@dataclass(frozen=True)
class FaultSettings:
    """Faults asked for on the command line; None means the fault is off.

    Attributes:
        fail_at_start: Exit with code 1 instead of listening.
        never_ready: Listen, but answer 503 to health and to every inference request.
        crash_after_requests: Serve this many requests; kill the process inside the next one.
        stall_after_requests: Serve this many requests; never answer the later ones.
        mid_stream_death_after_tokens: Kill the engine once a stream has sent this many tokens.
        death_linger_seconds: How long the HTTP front outlives a dead engine.
        leak_mebibytes_per_second: Memory taken for good every second from the start on; 0 for none.
        leak_limit_mebibytes: Leaked memory at which the process is killed as the kernel would kill it.
    """

    fail_at_start: bool = False
    never_ready: bool = False
    crash_after_requests: int | None = None
    stall_after_requests: int | None = None
    mid_stream_death_after_tokens: int | None = None
    death_linger_seconds: float = 1.5
    leak_mebibytes_per_second: float = 0.0
    leak_limit_mebibytes: int = 1024


@dataclass(frozen=True)
class SimulatorSettings:
    """Everything one simulator process is told.

    Attributes:
        model: The model path or id, shown as `root` in /v1/models.
        served_model_names: Names that requests may use; the first labels every metric.
        host: Address to listen on.
        port: Port to listen on; 0 lets the system choose.
        startup_seconds: Time before the port is opened.
        shutdown_timeout_seconds: Time that running requests get after SIGTERM.
        default_output_tokens: Output length where the request gives none.
        prompt_tokens_details: Whether usage tells the cached prompt tokens.
        fleet_size: Engines in this process, on ports that follow each other.
        data_parallel_size: Ranks behind one port, each with a cache and a batch of its own.
        max_queued_requests: Unfinished requests beyond which new ones get 503, None for no limit.
        max_queued_tokens: Prompt tokens without a first token at which new requests get 503.
        development_mode: Whether the routes of vLLM's VLLM_SERVER_DEV_MODE exist.
        enable_lora: Whether adapters can be used.
        runtime_lora_updating: Whether adapters can be loaded and unloaded by request.
        lora_adapters: Adapters that are there from the start.
        kv_events: Where KV events go, None for nowhere.
    """

    model: str
    served_model_names: tuple[str, ...]
    host: str = "0.0.0.0"  # noqa: S104 - vLLM's default is every interface, and so is ours
    port: int = 8000
    startup_seconds: float = 0.0
    shutdown_timeout_seconds: float = 0.0
    default_output_tokens: int = 16
    prompt_tokens_details: bool = False
    fleet_size: int = 1
    data_parallel_size: int = 1
    max_queued_requests: int | None = None
    max_queued_tokens: int | None = None
    development_mode: bool = False
    enable_lora: bool = False
    runtime_lora_updating: bool = False
    lora_adapters: tuple[LoraAdapter, ...] = ()
    kv_events: KvEventSettings | None = None
    limits: EngineLimits = field(default_factory=EngineLimits)
    timing: StepTiming = field(default_factory=StepTiming)
    faults: FaultSettings = field(default_factory=FaultSettings)

    @property
    def metric_model_name(self) -> str:
        """The value of every `model_name` label."""
        return self.served_model_names[0]
