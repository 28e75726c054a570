"""Which adapter serves which engine: the one place to add a new one."""

from collections.abc import Mapping
from pathlib import Path

from millrace.core.v1 import types_pb2

from nodeagent.engines.base import EngineAdapter
from nodeagent.engines.external import ExternalAdapter
from nodeagent.engines.simulator_adapter import SimulatorAdapter
from nodeagent.engines.vllm import VllmAdapter

EngineAdapters = Mapping[int, EngineAdapter]


def default_adapters(
    *, engine_directory: Path, device_kinds: frozenset[int], cpu_threads: int, socket_directory: Path
) -> EngineAdapters:
    """Builds the adapters of all engines that this agent knows."""
    return {
        types_pb2.ENGINE_VLLM: VllmAdapter(engine_directory, device_kinds, cpu_threads, socket_directory),
        types_pb2.ENGINE_EXTERNAL: ExternalAdapter(),
        types_pb2.ENGINE_SIMULATOR: SimulatorAdapter(socket_directory),
    }
