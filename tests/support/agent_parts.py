"""The parts around an agent's lifecycle as tests want them: engines that do as told, a scripted probe."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from millrace.core.v1 import node_pb2, replica_pb2, stats_pb2, types_pb2

from nodeagent.engines.base import CannotStart, ClaimedDevice, LaunchCommand
from nodeagent.engines.metrics_text import VLLM_NAMES, parse_stats
from nodeagent.health import Facts, Outcome
from nodeagent.runtimes.base import EngineProcess, ProcessIdentity

GOOD = Outcome(ok=True)
BAD = Outcome(ok=False, reason="no answer")


class FakeProcess:
    def __init__(self, on_exit: Callable[[], None]) -> None:
        self.identity = ProcessIdentity(4242, 1, "boot")
        self.exited = False
        self.exit_description = ""
        self.signals: list[str] = []
        self.obedient = True
        self._on_exit = on_exit

    def end(self, description: str) -> None:
        self.exited, self.exit_description = True, description
        self._on_exit()

    def terminate(self) -> None:
        self.signals.append("TERM")
        if self.obedient:
            self.end("exit code 0")

    def memory_bytes(self) -> int | None:
        return None

    def kill(self) -> None:
        self.signals.append("KILL")

    def release(self) -> None:
        self.signals.append("released")


class FakeRuntime:
    def __init__(self) -> None:
        self.processes: list[FakeProcess] = []
        self.commands: list[LaunchCommand] = []
        self.labels: list[Mapping[str, str]] = []

    async def start(
        self,
        command: LaunchCommand,
        *,
        labels: Mapping[str, str],
        log_path: Path,
        on_exit: Callable[[], None],
    ) -> FakeProcess:
        self.commands.append(command)
        self.labels.append(labels)
        self.processes.append(FakeProcess(on_exit))
        return self.processes[-1]

    async def adopt(
        self, identity: ProcessIdentity, *, labels: Mapping[str, str], on_exit: Callable[[], None]
    ) -> EngineProcess | None:
        return None

    async def sweep(self, identity: ProcessIdentity) -> int:
        return 0

    async def sweep_unknown(self, labels: Mapping[str, str], is_owned: Callable[[int, str], bool]) -> int:
        return 0


class FakeProbe:
    """Answers as the test says."""

    def __init__(self) -> None:
        self.alive = GOOD
        self.served = GOOD
        self.models = GOOD
        self.page = 'vllm:num_requests_running{engine="0"} 0\nvllm:num_requests_waiting{engine="0"} 0\n'
        self.canaries = 0

    async def liveness(self, url: str) -> Outcome:
        return self.alive

    async def served_models(self, url: str) -> Outcome:
        return self.models

    async def canary(self, url: str, model: str, *, timeout_seconds: float) -> Outcome:
        self.canaries += 1
        return self.served

    async def facts(self, url: str, model: str) -> Facts:
        return Facts("9.9", 2048)

    async def metrics(self, url: str) -> tuple[Outcome, str]:
        return GOOD, self.page


class FakeAdapter:
    def __init__(self) -> None:
        self.refusal = ""

    def environments(self) -> Sequence[node_pb2.EngineEnvironment]:
        return []

    def check(self, launch: replica_pb2.LaunchSpec, devices: Sequence[ClaimedDevice]) -> None:
        if self.refusal:
            raise CannotStart(self.refusal)

    def command(
        self, launch: replica_pb2.LaunchSpec, *, host: str, port: int, devices: Sequence[ClaimedDevice]
    ) -> LaunchCommand:
        return LaunchCommand(("engine", str(port)), {})

    def parse_metrics(self, text: str) -> stats_pb2.EngineStats:
        return parse_stats(text, VLLM_NAMES)

    def parse_start(self, log: str, metrics: str, launch: replica_pb2.LaunchSpec) -> replica_pb2.EngineFacts:
        return replica_pb2.EngineFacts()


class FakeDevices:
    def __init__(self) -> None:
        self.free: int | None = None

    def devices(self) -> Sequence[node_pb2.Device]:
        return [node_pb2.Device(id="cpu", kind=types_pb2.DEVICE_KIND_CPU, memory_bytes=2**33)]

    def sample(self) -> Sequence[stats_pb2.DeviceStats]:
        return []

    def free_bytes(self, device_id: str) -> int | None:
        return self.free
