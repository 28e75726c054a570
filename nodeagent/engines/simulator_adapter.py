"""The simulator: Millrace's own engine look-alike, started like a real engine.

It needs no model files and runs in the agent's own Python environment, as a process of its own.
"""

import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

from millrace.core.v1 import node_pb2, replica_pb2, stats_pb2, types_pb2

from core import VERSION
from nodeagent.engines.arguments import ArgumentValue, merge_arguments, to_argv
from nodeagent.engines.base import ClaimedDevice, LaunchCommand
from nodeagent.engines.kv_events import OPTION as KV_EVENTS_OPTION
from nodeagent.engines.kv_events import kv_events_config
from nodeagent.engines.metrics_text import VLLM_NAMES, parse_stats

_MODULE = "nodeagent.engines.simulator"
# Placement facts of the real engine that a simulated one has no use for.
_IGNORED = (
    *("tensor-parallel-size", "gpu-memory-utilization", "kv-cache-memory-bytes", "dtype"),
    KV_EVENTS_OPTION,
)


class SimulatorAdapter:
    """Starts `millrace-simulator`."""

    def __init__(self, socket_directory: Path | None = None) -> None:
        """Takes where engines open sockets for their KV events."""
        self._socket_directory = socket_directory

    def environments(self) -> Sequence[node_pb2.EngineEnvironment]:
        """The simulator comes with the agent and runs on a CPU share."""
        missing = importlib.util.find_spec(_MODULE) is None
        return [
            node_pb2.EngineEnvironment(
                engine=types_pb2.ENGINE_SIMULATOR,
                version=VERSION,
                device_kinds=[types_pb2.DEVICE_KIND_CPU],
                unavailable_reason="this installation has no simulator" if missing else "",
            )
        ]

    def check(self, launch: replica_pb2.LaunchSpec, devices: Sequence[ClaimedDevice]) -> None:  # noqa: ARG002 - the protocol's signature
        """Checks the arguments.

        Raises:
            CannotStart: They are not acceptable.
        """
        self._arguments(launch, host="127.0.0.1", port=0)

    def command(
        self,
        launch: replica_pb2.LaunchSpec,
        *,
        host: str,
        port: int,
        devices: Sequence[ClaimedDevice],  # noqa: ARG002 - the protocol's signature
    ) -> LaunchCommand:
        """Builds the command.

        Raises:
            CannotStart: The arguments are not acceptable.
        """
        arguments = self._arguments(launch, host=host, port=port)
        return LaunchCommand((sys.executable, "-m", _MODULE, *to_argv(arguments)), {})

    def parse_metrics(self, text: str) -> stats_pb2.EngineStats:
        """Reads the simulator's metrics page, which has vLLM's names."""
        return parse_stats(text, VLLM_NAMES)

    def parse_start(
        self,
        log: str,  # noqa: ARG002 - the protocol's signature
        metrics: str,  # noqa: ARG002 - as above
        launch: replica_pb2.LaunchSpec,  # noqa: ARG002 - as above
    ) -> replica_pb2.EngineFacts:
        """Knows nothing: the simulator loads no model."""
        return replica_pb2.EngineFacts()

    def _arguments(self, launch: replica_pb2.LaunchSpec, *, host: str, port: int) -> dict[str, ArgumentValue]:
        computed: dict[str, ArgumentValue] = {
            "model": launch.model,
            "served-model-name": launch.served_model_name,
            "host": host,
            "port": str(port),
        }
        if launch.max_model_len > 0:
            computed["max-model-len"] = str(launch.max_model_len)
        computed["kv-events-config"] = kv_events_config(
            launch.extra_args, port=port, socket_directory=self._socket_directory
        )
        return merge_arguments(computed, launch.extra_args, ignored=_IGNORED)
