"""The seam between the agent and an engine.

In: a `LaunchSpec` and the claimed devices. Out: a command line with its environment, the environments
that this machine offers, and normalised samples read from the engine's metrics page. Adapters hold no
state of a replica, so that one adapter serves all replicas of its engine.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from millrace.core.v1 import node_pb2, replica_pb2, stats_pb2, types_pb2

from core import errors


class CannotStart(errors.FailedPrecondition):
    """The engine cannot be started here; the message names the remedy."""


@dataclass(frozen=True, slots=True)
class ClaimedDevice:
    """A device and the part of its memory that a replica may use."""

    device: node_pb2.Device
    memory_bytes: int


@dataclass(frozen=True, slots=True)
class LaunchCommand:
    """A process to start.

    Attributes:
        argv: Program and arguments; holds no secrets, since every user of the machine can read it.
        environment: Variables on top of the small allow list that every engine gets.
    """

    argv: tuple[str, ...]
    environment: Mapping[str, str]


class EngineAdapter(Protocol):
    """What the agent needs to know of an engine."""

    def environments(self) -> Sequence[node_pb2.EngineEnvironment]:
        """Lists the builds of this engine on this machine, usable or not."""
        ...

    def check(self, launch: replica_pb2.LaunchSpec, devices: Sequence[ClaimedDevice]) -> None:
        """Checks what a start needs: build, model files, arguments.

        Raises:
            CannotStart: Something is missing or wrong.
        """
        ...

    def command(
        self, launch: replica_pb2.LaunchSpec, *, host: str, port: int, devices: Sequence[ClaimedDevice]
    ) -> LaunchCommand | None:
        """Builds the command; None where there is nothing to start because someone else runs it.

        Raises:
            CannotStart: The arguments are not acceptable.
        """
        ...

    def parse_metrics(self, text: str) -> stats_pb2.EngineStats:
        """Reads a metrics page; what the page does not say stays unset."""
        ...

    def parse_start(self, log: str, metrics: str, launch: replica_pb2.LaunchSpec) -> replica_pb2.EngineFacts:
        """Reads what a start took from the engine's log and metrics; what they do not say stays unset."""
        ...


def device_kind(devices: Sequence[ClaimedDevice]) -> types_pb2.DeviceKind.ValueType:
    """Returns the kind that all claimed devices share.

    Raises:
        CannotStart: There is no device, or the kinds are mixed.
    """
    kinds = {claimed.device.kind for claimed in devices}
    if len(kinds) != 1:
        names = ", ".join(sorted(types_pb2.DeviceKind.Name(kind) for kind in kinds)) or "none"
        raise CannotStart(f"an engine needs devices of one kind; claimed: {names}")
    return kinds.pop()
