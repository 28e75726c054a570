"""Options of the control plane: command line, environment (`MILLRACE_CONTROLPLANE_...`), and defaults.

In come strings, out come checked values, or one line that names the wrong option. Secrets are given as
files, never as values, since arguments stand in the process list.
"""

import stat
from pathlib import Path
from typing import Annotated, Literal, Self
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from core.rpc import TlsFiles, require_safe_bind
from core.store.etcd_settings import EtcdSettings

Port = Annotated[int, Field(ge=0, le=65535)]
# A longer file is not a token.
TOKEN_BYTES_MAX = 4096


class ControlPlaneSettings(BaseSettings):
    """Control plane: takes declarations, places replicas, heals them, and explains what it did."""

    model_config = SettingsConfigDict(
        env_prefix="MILLRACE_CONTROLPLANE_",
        cli_prog_name="millrace-controlplane",
        cli_kebab_case=True,
        cli_hide_none_type=True,
        extra="forbid",
        frozen=True,
    )

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
    etcd_endpoints: str = Field(
        "127.0.0.1:2389", description="Members of etcd, host:port, separated by commas."
    )
    etcd_tls_ca: Path | None = Field(None, description="PEM file of etcd's authorities; turns TLS on.")
    etcd_tls_certificate: Path | None = Field(None, description="PEM file of our certificate for etcd.")
    etcd_tls_key: Path | None = Field(None, description="PEM file of its key.")
    etcd_username: str = Field("", description="etcd user; empty where etcd's authentication is off.")
    etcd_password_file: Path | None = Field(None, description="File with that user's password.")
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
    tls_certificate: Path | None = Field(None, description="PEM file of our certificate.")
    tls_key: Path | None = Field(None, description="PEM file of its key.")
    tls_authority: Path | None = Field(
        None, description="PEM file of authorities; checks gRPC clients, and the agents that are called."
    )
    allow_plaintext: bool = Field(False, description="Listen beyond this machine without TLS, on purpose.")
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field(
        "INFO", description="Lowest level that is logged."
    )
    log_style: Literal["auto", "json", "console"] = Field(
        "auto", description="auto: readable on a terminal, JSON elsewhere."
    )

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
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ValueError("tls_certificate and tls_key come together")
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
        self.etcd()
        return self

    def tls(self) -> TlsFiles:
        """Returns the TLS files, of server and client alike."""
        return TlsFiles(self.tls_certificate, self.tls_key, self.tls_authority)

    def etcd(self) -> EtcdSettings:
        """Returns how to reach etcd."""
        return EtcdSettings(
            endpoints=tuple(each.strip() for each in self.etcd_endpoints.split(",") if each.strip()),
            tls_ca=self.etcd_tls_ca,
            tls_certificate=self.etcd_tls_certificate,
            tls_key=self.etcd_tls_key,
            username=self.etcd_username,
            password_file=self.etcd_password_file,
        )


def read_token(path: Path) -> str:
    """Reads a token from its file.

    Raises:
        ValueError: The file cannot be read, is empty or is none; with the remedy.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(
            f"{path} cannot be read: {error.strerror}; make one with `openssl rand -hex 32 > {path}`"
        ) from error
    token = content[:TOKEN_BYTES_MAX].decode("utf-8", "replace").strip()
    if not token:
        raise ValueError(f"{path} is empty; fill it with `openssl rand -hex 32 > {path}`")
    if len(content) > TOKEN_BYTES_MAX or not token.isascii() or not token.isprintable() or " " in token:
        raise ValueError(f"{path} holds no token: one line of printable ASCII without blanks is expected")
    return token


def readable_by_others(path: Path) -> bool:
    """Tells whether users besides the owner may read a file."""
    return bool(path.stat().st_mode & (stat.S_IRGRP | stat.S_IROTH))
