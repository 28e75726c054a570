"""vLLM, on CPU and on NVIDIA GPUs: one adapter, two builds.

Builds lie under the engine directory, each in a Python environment of its own: `vllm-cpu/` and
`vllm-cuda/`, where the file `INSTALLED` holds the version and marks the installation as complete. The
adapter builds command lines; it never imports vLLM.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from millrace.core.v1 import node_pb2, replica_pb2, stats_pb2, types_pb2

from nodeagent.engines.arguments import ArgumentValue, merge_arguments, to_argv
from nodeagent.engines.base import CannotStart, ClaimedDevice, LaunchCommand, device_kind
from nodeagent.engines.kv_events import OPTION as KV_EVENTS_OPTION
from nodeagent.engines.kv_events import kv_events_config
from nodeagent.engines.metrics_text import VLLM_NAMES, parse_stats
from nodeagent.engines.vllm_start import read_start

_MODULE = "vllm.entrypoints.openai.api_server"
# After SIGTERM the engine finishes running requests for this long; the agent's own limit ends it earlier
# where it must.
SHUTDOWN_TIMEOUT_SECONDS = 20
# vLLM refuses shares above 1 and needs some room for its own start.
_UTILIZATION_MIN, _UTILIZATION_MAX = 0.05, 0.98

_QUANTIZATION: Mapping[int, str] = {
    types_pb2.QUANTIZATION_AWQ: "awq",
    types_pb2.QUANTIZATION_GPTQ: "gptq",
    types_pb2.QUANTIZATION_FP8: "fp8",
}
_BUILDS: Mapping[types_pb2.DeviceKind.ValueType, str] = {
    types_pb2.DEVICE_KIND_CPU: "vllm-cpu",
    types_pb2.DEVICE_KIND_NVIDIA: "vllm-cuda",
}


@dataclass(frozen=True, slots=True)
class VllmAdapter:
    """Starts vLLM's OpenAI server.

    Attributes:
        engine_directory: Holds the builds.
        device_kinds: Kinds of device that this machine has.
        cpu_threads: OpenMP threads of one CPU engine.
        socket_directory: Where engines open sockets for their KV events.
    """

    engine_directory: Path
    device_kinds: frozenset[int]
    cpu_threads: int = 1
    socket_directory: Path | None = None

    def environments(self) -> Sequence[node_pb2.EngineEnvironment]:
        """Lists the builds that the devices of this machine could use."""
        return [
            node_pb2.EngineEnvironment(
                engine=types_pb2.ENGINE_VLLM,
                version=self._version(kind),
                device_kinds=[kind],
                unavailable_reason=self._missing(kind),
            )
            for kind in _BUILDS
            if kind in self.device_kinds
        ]

    def check(self, launch: replica_pb2.LaunchSpec, devices: Sequence[ClaimedDevice]) -> None:
        """Checks build, model files and arguments.

        Raises:
            CannotStart: Something is missing or wrong.
        """
        reason = self._missing(device_kind(devices))
        if reason:
            raise CannotStart(reason)
        if is_local_model(launch.model):
            check_model_directory(launch.model)
        self._arguments(launch, host="127.0.0.1", port=0, devices=devices)

    def command(
        self, launch: replica_pb2.LaunchSpec, *, host: str, port: int, devices: Sequence[ClaimedDevice]
    ) -> LaunchCommand:
        """Builds the command.

        Raises:
            CannotStart: The arguments are not acceptable.
        """
        kind = device_kind(devices)
        arguments = self._arguments(launch, host=host, port=port, devices=devices)
        environment = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "VLLM_HOST_IP": host}
        if is_local_model(launch.model):
            # Nothing is to be fetched, so nothing waits for a hub that cannot be reached.
            environment |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
        if kind == types_pb2.DEVICE_KIND_NVIDIA:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(claimed.device.id for claimed in devices)
        else:
            # Pinned threads of two engines would share the first cores and leave the others idle.
            environment |= {
                "VLLM_CPU_OMP_THREADS_BIND": "nobind",
                "OMP_NUM_THREADS": str(self.cpu_threads),
            }
        shim = self._directory(kind) / "shim"
        if shim.is_dir():
            # Some CPU builds carry no distribution metadata of their own.
            environment["PYTHONPATH"] = str(shim)
        return LaunchCommand((str(self._python(kind)), "-m", _MODULE, *to_argv(arguments)), environment)

    def parse_metrics(self, text: str) -> stats_pb2.EngineStats:
        """Reads vLLM's metrics page."""
        return parse_stats(text, VLLM_NAMES)

    def parse_start(self, log: str, metrics: str, launch: replica_pb2.LaunchSpec) -> replica_pb2.EngineFacts:
        """Reads the memory that vLLM says it took."""
        return read_start(log, metrics, tensor_parallel=max(1, launch.tensor_parallel))

    def _arguments(
        self, launch: replica_pb2.LaunchSpec, *, host: str, port: int, devices: Sequence[ClaimedDevice]
    ) -> dict[str, ArgumentValue]:
        computed: dict[str, ArgumentValue] = {
            "model": _model_argument(launch.model),
            "served-model-name": launch.served_model_name,
            "host": host,
            "port": str(port),
            "enable-prompt-tokens-details": True,
            "enable-request-id-headers": True,
            "shutdown-timeout": str(SHUTDOWN_TIMEOUT_SECONDS),
        }
        if launch.max_model_len > 0:
            computed["max-model-len"] = str(launch.max_model_len)
        if launch.tensor_parallel > 1:
            computed["tensor-parallel-size"] = str(launch.tensor_parallel)
        if launch.quantization in _QUANTIZATION:
            computed["quantization"] = _QUANTIZATION[launch.quantization]
        utilization = str(_utilization(devices))
        if device_kind(devices) == types_pb2.DEVICE_KIND_NVIDIA:
            computed["gpu-memory-utilization"] = utilization
        else:
            computed |= {"enforce-eager": True, "dtype": "bfloat16"}
            if launch.kv_cache_bytes > 0:
                computed["kv-cache-memory-bytes"] = str(launch.kv_cache_bytes)
            else:
                # On the CPU build this flag is the share of main memory, despite its name.
                computed["gpu-memory-utilization"] = utilization
        computed["kv-events-config"] = kv_events_config(
            launch.extra_args, port=port, socket_directory=self.socket_directory
        )
        return merge_arguments(computed, launch.extra_args, ignored=(KV_EVENTS_OPTION,))

    def _directory(self, kind: types_pb2.DeviceKind.ValueType) -> Path:
        if kind not in _BUILDS:
            raise CannotStart(f"vLLM has no build for {types_pb2.DeviceKind.Name(kind)}")
        return (self.engine_directory / _BUILDS[kind]).absolute()

    def _python(self, kind: types_pb2.DeviceKind.ValueType) -> Path:
        return self._directory(kind) / "bin" / "python"

    def _version(self, kind: types_pb2.DeviceKind.ValueType) -> str:
        marker = self._directory(kind) / "INSTALLED"
        return marker.read_text().strip()[:64] if marker.is_file() else ""

    def _missing(self, kind: types_pb2.DeviceKind.ValueType) -> str:
        """Says why the build cannot be started; empty where it can."""
        python, marker = self._python(kind), self._directory(kind) / "INSTALLED"
        if not python.exists():
            return f"vLLM is not installed: {python} does not exist; `make up` installs it"
        if not marker.is_file():
            return f"the installation of vLLM is not complete: {marker} is missing; run `make up` again"
        return ""


def is_local_model(model: str) -> bool:
    """Tells a path from a hub id."""
    return model.startswith(("/", "./", "../", "~"))


def _model_argument(model: str) -> str:
    # The engine runs in another working directory than the agent.
    return str(Path(model).expanduser().absolute()) if is_local_model(model) else model


def check_model_directory(model: str) -> None:
    """Checks that a model directory can be read.

    Raises:
        CannotStart: It does not exist here, or has no configuration that can be read.
    """
    directory = Path(model).expanduser()
    configuration = directory / "config.json"
    try:
        if not directory.is_dir():
            raise CannotStart(f"the model directory {model} does not exist on this node")
        if not configuration.is_file():
            raise CannotStart(f"{configuration} does not exist: {model} is not a model directory")
        configuration.read_bytes()
    except OSError as error:
        raise CannotStart(f"the model at {model} cannot be read: {error.strerror}") from error


def _utilization(devices: Sequence[ClaimedDevice]) -> float:
    shares = [
        claimed.memory_bytes / claimed.device.memory_bytes
        for claimed in devices
        if claimed.device.memory_bytes > 0 and claimed.memory_bytes > 0
    ]
    if not shares:
        return _UTILIZATION_MAX
    # Rounded down: a share that is a little too large claims memory that was promised to another.
    share = math.floor(max(shares) * 1000) / 1000
    return min(_UTILIZATION_MAX, max(_UTILIZATION_MIN, share))
