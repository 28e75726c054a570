"""Options of the control plane: command line, environment (`MILLRACE_CONTROLPLANE_...`), and defaults.

In come strings, out come checked values, or one line that names the wrong option. Secrets are given as
files, never as values, since arguments stand in the process list.
"""

from pathlib import Path
from typing import Annotated, Self
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from controlplane.knowledge.environments import read_operator_rows
from core.rpc import require_safe_bind
from core.settings import EtcdOptions, LogOptions, Port, TlsOptions, process_configuration, read_token


class ControlPlaneSettings(LogOptions, TlsOptions, EtcdOptions):
    """Control plane: takes declarations, places replicas, heals them, and explains what it did."""

    model_config = process_configuration("controlplane")

    grpc_host: str = Field(
        "127.0.0.1", description="Address of the gRPC services; default: this machine only."
    )
    grpc_port: Port = Field(7600, description="Port of the gRPC services; 0 takes a free one.")
    gateway_host: str = Field(
        "127.0.0.1", description="Address of the HTTP gateway, with /metrics and /health."
    )
    gateway_port: Port = Field(7601, description="Port of the HTTP gateway; 0 takes a free one.")
    admin_token_file: Path = Field(description="File with the admin token; users and operators show it.")
    fleet_token_file: Path = Field(description="File with the fleet token; node agents show and accept it.")
    data_directory: Path = Field(
        Path(".millrace/controlplane"),
        description="Holds this member's identity; one process at a time may use it.",
    )
    router_url: str = Field(
        "http://127.0.0.1:8080", description="Base URL of the router that users are told, without /v1."
    )
    gateway_url: str = Field(
        "", description="Base URL of the gateway that users are told; default: as it listens."
    )
    heartbeat_seconds: Annotated[float, Field(gt=0, le=60)] = Field(
        2.0, description="Time between an agent's heartbeats."
    )
    stats_seconds: Annotated[float, Field(gt=0, le=60)] = Field(
        1.0, description="Time between an agent's samples; routers balance by them."
    )
    lost_after_seconds: Annotated[float, Field(gt=0, le=3600)] = Field(
        40.0,
        description="Silence after which a node's replicas are replaced; longer than an agent's restart.",
    )
    drain_seconds: Annotated[float, Field(ge=0, le=3600)] = Field(
        30.0, description="Time that a draining replica has to finish its requests."
    )

    environments_file: Path | None = Field(
        None,
        description="Your own rows of the matrix from engine and hardware to image family and arguments.",
    )

    @field_validator("environments_file")
    @classmethod
    def _check_environments(cls, value: Path | None) -> Path | None:
        if value is not None:
            read_operator_rows(value)
        return value

    @field_validator("admin_token_file", "fleet_token_file")
    @classmethod
    def _check_token_file(cls, value: Path) -> Path:
        read_token(value)
        return value

    @field_validator("router_url", "gateway_url")
    @classmethod
    def _check_url(cls, value: str) -> str:
        if not value:
            return value
        parts = urlsplit(value)
        if parts.scheme not in {"http", "https"} or not parts.hostname or parts.query or parts.fragment:
            raise ValueError(f"`{value}` is no http(s) base URL such as http://router.example:8080")
        return value.rstrip("/").removesuffix("/v1")

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if read_token(self.admin_token_file) == read_token(self.fleet_token_file):
            raise ValueError(
                "admin_token_file and fleet_token_file hold the same token; give agents their own"
            )
        if self.lost_after_seconds < 3 * self.heartbeat_seconds:
            raise ValueError(
                "lost_after_seconds must be at least three heartbeats: one lost packet would cost a node"
            )
        for option, host in (("grpc_host", self.grpc_host), ("gateway_host", self.gateway_host)):
            require_safe_bind(host, self.tls(), allow_plaintext=self.allow_plaintext, option=option)
        return self
