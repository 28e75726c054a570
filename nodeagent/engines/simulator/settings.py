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
    """

    max_model_length_tokens: int = DEFAULT_MAX_MODEL_LENGTH_TOKENS
    max_running_sequences: int = 256
    max_batched_tokens: int = 2048
    block_size_tokens: int = 16
    block_count: int = 4096
    prefix_caching: bool = True

    @property
    def capacity_tokens(self) -> int:
        """Tokens that fit into the usable blocks; one block is the null block, as in vLLM."""
        return (self.block_count - 1) * self.block_size_tokens


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
    """

    fail_at_start: bool = False
    never_ready: bool = False
    crash_after_requests: int | None = None
    stall_after_requests: int | None = None
    mid_stream_death_after_tokens: int | None = None
    death_linger_seconds: float = 1.5


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
    """

    model: str
    served_model_names: tuple[str, ...]
    host: str = "0.0.0.0"  # noqa: S104 - vLLM's default is every interface, and so is ours
    port: int = 8000
    startup_seconds: float = 0.0
    shutdown_timeout_seconds: float = 0.0
    default_output_tokens: int = 16
    prompt_tokens_details: bool = False
    limits: EngineLimits = field(default_factory=EngineLimits)
    timing: StepTiming = field(default_factory=StepTiming)
    faults: FaultSettings = field(default_factory=FaultSettings)

    @property
    def metric_model_name(self) -> str:
        """The value of every `model_name` label."""
        return self.served_model_names[0]
