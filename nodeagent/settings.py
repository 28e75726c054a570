"""Options of the node agent: command line, environment (`MILLRACE_NODEAGENT_...`), and their defaults.

In come strings, out come checked values, or one line that names the wrong option. Secrets are given as
files, never as values.
"""

import re
import socket
from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, field_validator, model_validator

from core import errors
from core.rpc import require_safe_bind, split_target
from core.settings import LogOptions, Port, TlsOptions, process_configuration, read_token

_NODE = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")


# Every one that does not answer costs a call's time-out before the next is tried.
CONTROLPLANES_MAX = 9


def _targets(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(each.strip() for each in text.split(",") if each.strip()))


def default_node_name(host_name: str) -> str:
    """Makes a host name DNS-safe: lower case, digits and dashes, at most 63 characters."""
    name = re.sub(r"[^a-z0-9]+", "-", host_name.lower()).strip("-")[:63].strip("-")
    return name or "node"


class AgentSettings(LogOptions, TlsOptions):
    """Node agent: starts, watches and stops engines on this machine as the control plane says."""

    model_config = process_configuration("nodeagent")

    node: str = Field(
        "", description="Name of this node, unique in the cluster; default: the host name, made DNS-safe."
    )
    grpc_host: str = Field(
        "127.0.0.1", description="Address of NodeAgentService; default: this machine only."
    )
    grpc_port: Port = Field(7610, description="Port of NodeAgentService; 0 takes a free one.")
    grpc_target: str = Field(
        "",
        description="host:port at which the control plane reaches NodeAgentService; default: as it listens.",
    )
    metrics_host: str = Field("127.0.0.1", description="Address of /metrics and /health.")
    metrics_port: Port = Field(7611, description="Port of /metrics and /health; 0 takes a free one.")
    controlplane_target: str = Field(
        "127.0.0.1:7600",
        description="Control planes, host:port, separated by commas; the next one is taken where one fails.",
    )
    fleet_token_file: Path = Field(
        description="File with the fleet token, which the agent shows and accepts."
    )
    admin_token_file: Path | None = Field(
        None, description="File with the admin token; lets an operator call NodeAgentService too."
    )
    router_token_file: Path | None = Field(
        None, description="File with the token that routers show; lets them stream engines' KV events."
    )
    data_directory: Path = Field(
        Path(".millrace/nodeagent"), description="Journal and engine logs; outlives the agent."
    )
    engine_directory: Path = Field(
        Path(".millrace/engines"), description="Engine builds, each in a Python environment of its own."
    )
    advertise_host: str = Field(
        "127.0.0.1", description="Address that engines listen on and at which routers reach them."
    )
    engine_port_first: Annotated[int, Field(ge=1024, le=65535)] = Field(
        21000, description="First port for engines."
    )
    engine_port_last: Annotated[int, Field(ge=1024, le=65535)] = Field(
        21999, description="Last port for engines; a thousand is far more than a machine can run."
    )
    devices_file: Path | None = Field(
        None, description="JSON list of {id, kind, product, memory_bytes}; replaces what the machine has."
    )
    cpu_memory_fraction: Annotated[float, Field(gt=0, le=1)] = Field(
        0.8, description="Share of main memory that engines may use; the rest is for everything else."
    )
    cpu_threads: Annotated[int, Field(ge=0, le=1024)] = Field(
        0, description="Compute threads of one CPU engine; 0: half of the processors, so that two can share."
    )
    start_timeout_seconds: Annotated[float, Field(gt=0, le=86_400)] = Field(
        600.0, description="Until an engine must have served its first token; large models load for minutes."
    )
    labels: dict[str, str] = Field({}, description="Labels of this node, as JSON.")
    stop_engines_on_exit: bool = Field(
        False, description="Stop all engines with the agent; by default they run on and are adopted later."
    )

    @field_validator("node")
    @classmethod
    def _check_node(cls, value: str) -> str:
        if value and not _NODE.fullmatch(value):
            raise ValueError("use at most 63 lower-case letters, digits and dashes")
        return value

    @field_validator("controlplane_target")
    @classmethod
    def _check_target(cls, value: str) -> str:
        targets = _targets(value)
        if not targets:
            raise ValueError("name at least one control plane, as host:port")
        if len(targets) > CONTROLPLANES_MAX:
            raise ValueError(f"{len(targets)} control planes; at most {CONTROLPLANES_MAX} are tried in turn")
        for target in targets:
            try:
                split_target(target)
            except errors.InvalidArgument as error:
                raise ValueError(error.violations[0].description) from error
        return value

    @field_validator("fleet_token_file", "admin_token_file", "router_token_file")
    @classmethod
    def _check_token_file(cls, value: Path | None) -> Path | None:
        if value is not None:
            read_token(value)
        return value

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if self.engine_port_last < self.engine_port_first:
            raise ValueError("--engine-port-last must not be smaller than --engine-port-first")
        for option, host in (("--grpc-host", self.grpc_host), ("--metrics-host", self.metrics_host)):
            require_safe_bind(host, self.tls(), allow_plaintext=self.allow_plaintext, option=option)
        return self

    @property
    def controlplane_targets(self) -> tuple[str, ...]:
        """Addresses of the control planes, each once."""
        return _targets(self.controlplane_target)

    @property
    def node_name(self) -> str:
        """Name of this node."""
        return self.node or default_node_name(socket.gethostname())
