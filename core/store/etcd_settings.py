"""How to reach etcd: addresses, TLS files, credentials, the bound of a request.

In come values of a configuration file or the environment, out come checked settings and gRPC
credentials. The password stays inside `SecretStr` or in its file until the moment it is sent.
"""

from pathlib import Path
from typing import Annotated, Self

import grpc
from pydantic import BaseModel, ConfigDict, Field, SecretStr, field_validator, model_validator

from core.store.types import StoreError


class EtcdSettings(BaseModel):
    """Settings of `EtcdStore`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    endpoints: Annotated[tuple[str, ...], Field(min_length=1, max_length=9)]
    """Members as host:port; 9 is beyond any sensible etcd cluster."""

    tls_ca: Path | None = None
    """PEM file of the authorities that sign the members' certificates; turns TLS on."""

    tls_certificate: Path | None = None
    """PEM file of our own certificate, where etcd asks for one."""

    tls_key: Path | None = None
    """PEM file of the key of `tls_certificate`."""

    username: str = ""
    """etcd user; empty where etcd's authentication is off."""

    password: SecretStr | None = None
    """Password of `username`, from the environment."""

    password_file: Path | None = None
    """File with the password, read anew at each log-in, so that it can be rotated."""

    request_timeout_seconds: Annotated[float, Field(gt=0, le=60)] = 5.0
    """Bound of a call, all attempts together: longer than an election (about 1.5 s by default)."""

    @field_validator("endpoints")
    @classmethod
    def _host_and_port(cls, endpoints: tuple[str, ...]) -> tuple[str, ...]:
        for endpoint in endpoints:
            host, _, port = endpoint.rpartition(":")
            if not host or not port.isdigit() or "/" in endpoint:
                raise ValueError(f"{endpoint!r} is not host:port (TLS is turned on by tls_ca)")
        return endpoints

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ValueError("tls_certificate and tls_key go together")
        if self.tls_certificate is not None and self.tls_ca is None:
            raise ValueError("tls_certificate needs tls_ca")
        if self.password is not None and self.password_file is not None:
            raise ValueError("give either password or password_file")
        if bool(self.username) != (self.password is not None or self.password_file is not None):
            raise ValueError("username and a password go together")
        return self

    def read_password(self) -> str:
        """Reads the password for a log-in.

        Raises:
            StoreError: The file cannot be read.
        """
        if self.password is not None:
            return self.password.get_secret_value()
        if self.password_file is None:
            return ""
        return _read(self.password_file).decode().strip()

    def channel_credentials(self) -> grpc.ChannelCredentials | None:
        """Builds credentials for TLS; None for plain connections.

        Raises:
            StoreError: One of the files cannot be read.
        """
        if self.tls_ca is None:
            return None
        return grpc.ssl_channel_credentials(
            root_certificates=_read(self.tls_ca),
            private_key=_read(self.tls_key) if self.tls_key else None,
            certificate_chain=_read(self.tls_certificate) if self.tls_certificate else None,
        )


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise StoreError(f"cannot read {path}: {error.strerror}") from error
