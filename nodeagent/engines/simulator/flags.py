"""The command line of the simulator: vLLM's names where they exist, own flags for the simulation.

In: argv. Out: `SimulatorSettings`, or argparse's exit code 2 with a message that names the flag.
Must not: accept a flag it does not act on, apart from the few marked as accepted for vLLM's sake:
a silent flag would let a test believe that the engine does what it does not.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NoReturn

from nodeagent.engines.simulator.settings import (
    DEFAULT_MAX_MODEL_LENGTH_TOKENS,
    EngineLimits,
    FaultSettings,
    KvEventSettings,
    LoraAdapter,
    SimulatorSettings,
    StepTiming,
)

_SUFFIXES = {"k": 10**3, "K": 2**10, "m": 10**6, "M": 2**20, "g": 10**9, "G": 2**30}


class _Parser(argparse.ArgumentParser):
    """Names unknown flags as what they are: vLLM flags that the simulator does not model."""

    def error(self, message: str) -> NoReturn:
        """Exits with code 2 and one line on standard error."""
        if message.startswith("unrecognized arguments"):
            message += " (the simulator models only the flags of --help)"
        super().error(message)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return value


def _natural(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"must be at least 0, got {text}")
    return value


def _duration(text: str) -> float:
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be finite and at least 0, got {text}")
    return value


def _port(text: str) -> int:
    value = int(text)
    if not 0 <= value <= 65535:
        raise argparse.ArgumentTypeError(f"must be between 0 and 65535, got {text}")
    return value


def _model_length(text: str) -> int | None:
    """Reads `4096`, `32k` (thousands), `32K` (1024s), and `auto` or `-1` for the default."""
    if text in {"auto", "-1"}:
        return None
    factor = _SUFFIXES.get(text[-1:], 1)
    number = float(text[:-1]) if factor != 1 else float(int(text))
    value = int(number * factor)
    if value < 2:
        raise argparse.ArgumentTypeError(f"must be at least 2 tokens, got {text}")
    return value


def _kv_events(text: str) -> KvEventSettings | None:
    """Reads vLLM's JSON; None where it says that nothing is published."""
    try:
        content: Any = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"must be JSON: {error}") from error
    if not isinstance(content, dict):
        raise argparse.ArgumentTypeError("must be a JSON object")
    enabled = content.pop("enable_kv_cache_events", False)
    publisher = content.pop("publisher", "zmq")
    known = set(KvEventSettings.__dataclass_fields__) - {"positional"}
    unknown = sorted(set(content) - known)
    if unknown:
        raise argparse.ArgumentTypeError(f"unknown field {unknown[0]}; known: {', '.join(sorted(known))}")
    return KvEventSettings(**content) if enabled is True and publisher == "zmq" else None


def _adapter(text: str) -> tuple[str, str]:
    name, separator, path = text.partition("=")
    if not separator or not name or not path:
        raise argparse.ArgumentTypeError(f"must be name=path, got {text}")
    return name, path


def _add_vllm_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("flags that vLLM has too")
    group.add_argument("--model", required=True)
    group.add_argument("--served-model-name", nargs="+", default=None)
    group.add_argument("--host", default=SimulatorSettings.host)
    group.add_argument("--port", type=_port, default=SimulatorSettings.port)
    group.add_argument("--max-model-len", type=_model_length, default=None)
    group.add_argument("--max-num-seqs", type=_positive, default=EngineLimits.max_running_sequences)
    group.add_argument("--max-num-batched-tokens", type=_positive, default=EngineLimits.max_batched_tokens)
    group.add_argument("--block-size", type=_positive, default=EngineLimits.block_size_tokens)
    group.add_argument("--num-gpu-blocks-override", type=_positive, default=EngineLimits.block_count)
    group.add_argument(
        "--enable-prefix-caching",
        action=argparse.BooleanOptionalAction,
        default=EngineLimits.prefix_caching,
    )
    group.add_argument("--enable-prompt-tokens-details", action="store_true")
    group.add_argument("--shutdown-timeout", type=_duration, default=0.0, help="seconds")
    group.add_argument("--data-parallel-size", type=_positive, default=1)
    group.add_argument("--max-num-queued-reqs", type=_positive, default=None)
    group.add_argument("--max-num-queued-tokens", type=_positive, default=None)
    group.add_argument("--enable-lora", action="store_true")
    group.add_argument("--max-loras", type=_positive, default=1)
    group.add_argument("--lora-modules", type=_adapter, nargs="+", default=[], metavar="NAME=PATH")
    group.add_argument("--kv-events-config", type=_kv_events, default=None, metavar="JSON")
    group.add_argument("--seed", type=int, default=0, help="accepted; the simulator draws no random numbers")


def _add_simulation_flags(parser: argparse.ArgumentParser) -> None:
    process = parser.add_argument_group("simulation")
    process.add_argument(
        "--fleet",
        type=_positive,
        default=1,
        metavar="N",
        help="engines in one process, on --port and later",
    )
    process.add_argument(
        "--server-dev-mode",
        action="store_true",
        help="as VLLM_SERVER_DEV_MODE=1: /sleep, /wake_up, /is_sleeping, /reset_prefix_cache",
    )
    process.add_argument(
        "--allow-runtime-lora-updating",
        action="store_true",
        help="as VLLM_ALLOW_RUNTIME_LORA_UPDATING=1: /v1/load_lora_adapter, /v1/unload_lora_adapter",
    )
    process.add_argument(
        "--kv-events-positional",
        action="store_true",
        help="write KV events as arrays without names, as older engines do",
    )
    timing = parser.add_argument_group("simulated time")
    timing.add_argument("--startup-seconds", type=_duration, default=0.0)
    timing.add_argument(
        "--prefill-tokens-per-second",
        type=_duration,
        default=StepTiming.prefill_tokens_per_second,
        help="0 means at once",
    )
    timing.add_argument("--inter-token-latency-ms", type=_duration, default=StepTiming.inter_token_latency_ms)
    timing.add_argument(
        "--inter-token-latency-ms-per-sequence",
        type=_duration,
        default=StepTiming.inter_token_latency_ms_per_sequence,
    )
    timing.add_argument(
        "--default-output-tokens", type=_positive, default=SimulatorSettings.default_output_tokens
    )
    faults = parser.add_argument_group("faults")
    faults.add_argument("--fail-at-start", action="store_true")
    faults.add_argument("--never-ready", action="store_true")
    faults.add_argument("--crash-after-requests", type=_natural, metavar="N")
    faults.add_argument("--stall-after-requests", type=_natural, metavar="N")
    faults.add_argument("--mid-stream-death-after-tokens", type=_natural, metavar="N")
    faults.add_argument("--death-linger-seconds", type=_duration, default=FaultSettings.death_linger_seconds)
    faults.add_argument(
        "--leak-mebibytes-per-second",
        type=_duration,
        default=FaultSettings.leak_mebibytes_per_second,
        help="take memory for good, until it is killed with SIGKILL",
    )
    faults.add_argument("--leak-limit-mebibytes", type=_positive, default=FaultSettings.leak_limit_mebibytes)


def parse_settings(argv: Sequence[str] | None = None) -> SimulatorSettings:
    """Reads the command line.

    Args:
        argv: Arguments without the program's name; None reads the process's own.

    Returns:
        The settings, complete and consistent.

    Raises:
        SystemExit: A flag is unknown, malformed, or contradicts another one.
    """
    parser = _Parser(
        prog="millrace-simulator",
        description="An engine look-alike that speaks vLLM 0.32's HTTP and metrics.",
        allow_abbrev=False,
    )
    _add_vllm_flags(parser)
    _add_simulation_flags(parser)
    flags = parser.parse_args(argv)
    _check(parser, flags)
    return _settings(flags, _limits(parser, flags))


def _check(parser: _Parser, flags: argparse.Namespace) -> None:
    """Refuses flags that contradict each other."""
    if flags.lora_modules and not flags.enable_lora:
        parser.error("argument --lora-modules: needs --enable-lora")
    if flags.port and flags.port + flags.fleet - 1 > 65535:
        parser.error("argument --fleet: the last port would lie above 65535")


def _limits(parser: _Parser, flags: argparse.Namespace) -> EngineLimits:
    """What the engine may hold; one request of the longest length must fit."""
    capacity_tokens = (flags.num_gpu_blocks_override - 1) * flags.block_size
    if flags.max_model_len is None:
        max_model_length_tokens = min(DEFAULT_MAX_MODEL_LENGTH_TOKENS, capacity_tokens)
    else:
        max_model_length_tokens = flags.max_model_len
    if capacity_tokens < 2 or max_model_length_tokens > capacity_tokens:
        parser.error(
            f"argument --max-model-len: one request of {max(2, max_model_length_tokens)} tokens "
            f"does not fit into the KV cache of {max(0, capacity_tokens)} tokens "
            "(raise --num-gpu-blocks-override or lower --max-model-len)"
        )
    return EngineLimits(
        max_model_length_tokens=max_model_length_tokens,
        max_running_sequences=flags.max_num_seqs,
        max_batched_tokens=flags.max_num_batched_tokens,
        block_size_tokens=flags.block_size,
        block_count=flags.num_gpu_blocks_override,
        prefix_caching=flags.enable_prefix_caching,
        max_running_adapters=flags.max_loras,
        kv_events=flags.kv_events_config is not None,
    )


def _settings(flags: argparse.Namespace, limits: EngineLimits) -> SimulatorSettings:
    kv_events = flags.kv_events_config
    if kv_events is not None and flags.kv_events_positional:
        kv_events = replace(kv_events, positional=True)
    return SimulatorSettings(
        model=flags.model,
        served_model_names=tuple(flags.served_model_name or [flags.model]),
        host=flags.host,
        port=flags.port,
        startup_seconds=flags.startup_seconds,
        shutdown_timeout_seconds=flags.shutdown_timeout,
        default_output_tokens=flags.default_output_tokens,
        prompt_tokens_details=flags.enable_prompt_tokens_details,
        fleet_size=flags.fleet,
        data_parallel_size=flags.data_parallel_size,
        max_queued_requests=flags.max_num_queued_reqs,
        max_queued_tokens=flags.max_num_queued_tokens,
        development_mode=flags.server_dev_mode,
        enable_lora=flags.enable_lora,
        runtime_lora_updating=flags.allow_runtime_lora_updating,
        lora_adapters=tuple(
            LoraAdapter(name, path, number) for number, (name, path) in enumerate(flags.lora_modules, 1)
        ),
        kv_events=kv_events,
        limits=limits,
        timing=StepTiming(
            prefill_tokens_per_second=flags.prefill_tokens_per_second,
            inter_token_latency_ms=flags.inter_token_latency_ms,
            inter_token_latency_ms_per_sequence=flags.inter_token_latency_ms_per_sequence,
        ),
        faults=FaultSettings(
            fail_at_start=flags.fail_at_start,
            never_ready=flags.never_ready,
            crash_after_requests=flags.crash_after_requests,
            stall_after_requests=flags.stall_after_requests,
            mid_stream_death_after_tokens=flags.mid_stream_death_after_tokens,
            death_linger_seconds=flags.death_linger_seconds,
            leak_mebibytes_per_second=flags.leak_mebibytes_per_second,
            leak_limit_mebibytes=flags.leak_limit_mebibytes,
        ),
    )
