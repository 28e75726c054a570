"""Options that processes share, and how every process reads its own.

In come a command line and the environment, out come checked settings, or one line on standard error that
names the wrong option and exit code 2. Secrets are given as files, never as values, since arguments stand
in the process list.
"""

import asyncio
import stat
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, NoReturn, Self, TypeVar

import pydantic
import uvloop
from pydantic import Field, model_validator
from pydantic_settings import BaseSettings, CliApp, SettingsConfigDict, SettingsError

from core import errors
from core.rpc import TlsFiles
from core.store.etcd_settings import EtcdSettings

Port = Annotated[int, Field(ge=0, le=65535)]
# A longer file is not a token.
TOKEN_BYTES_MAX = 4096

_S = TypeVar("_S", bound=BaseSettings)


def process_configuration(name: str) -> SettingsConfigDict:
    """Returns how a process reads its options: `millrace-<name>` and `MILLRACE_<NAME>_...`."""
    return SettingsConfigDict(
        env_prefix=f"MILLRACE_{name.upper()}_",
        cli_prog_name=f"millrace-{name}",
        cli_kebab_case=True,
        cli_hide_none_type=True,
        cli_implicit_flags=True,
        extra="forbid",
        frozen=True,
    )


class LogOptions(BaseSettings):
    """How a process logs."""

    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field(
        "INFO", description="Lowest level that is logged."
    )
    log_style: Literal["auto", "json", "console"] = Field(
        "auto", description="auto: readable on a terminal, JSON elsewhere."
    )


class TlsOptions(BaseSettings):
    """How a process proves itself and checks others on gRPC."""

    tls_certificate: Path | None = Field(None, description="PEM file of our certificate.")
    tls_key: Path | None = Field(None, description="PEM file of its key.")
    tls_authority: Path | None = Field(
        None, description="PEM file of authorities; checks whoever calls us, and whom we call."
    )
    allow_plaintext: bool = Field(False, description="Listen beyond this machine without TLS, on purpose.")

    @model_validator(mode="after")
    def _check_tls(self) -> Self:
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ValueError("--tls-certificate and --tls-key come together")
        return self

    def tls(self) -> TlsFiles:
        """Returns the TLS files, of server and client alike."""
        return TlsFiles(self.tls_certificate, self.tls_key, self.tls_authority)


class EtcdOptions(BaseSettings):
    """How a process reaches etcd."""

    etcd_endpoints: str = Field(
        "127.0.0.1:2389", description="Members of etcd, host:port, separated by commas."
    )
    etcd_tls_ca: Path | None = Field(None, description="PEM file of etcd's authorities; turns TLS on.")
    etcd_tls_certificate: Path | None = Field(None, description="PEM file of our certificate for etcd.")
    etcd_tls_key: Path | None = Field(None, description="PEM file of its key.")
    etcd_username: str = Field("", description="etcd user; empty where etcd's authentication is off.")
    etcd_password_file: Path | None = Field(None, description="File with that user's password.")

    @model_validator(mode="after")
    def _check_etcd(self) -> Self:
        self.etcd()
        return self

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


def read_settings(kind: type[_S], arguments: Sequence[str]) -> _S:
    """Reads a process's options; a wrong one ends the process with one line and exit code 2."""
    program = str(kind.model_config.get("cli_prog_name") or kind.__name__)
    try:
        return CliApp.run(kind, cli_args=list(arguments))
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        option = "--" + "-".join(str(part) for part in first["loc"]).replace("_", "-") if first["loc"] else ""
        message = str(first["msg"]).removeprefix("Value error, ")
        give_up(program, 2, f"{option}: {message}".removeprefix(": "))
    except (SettingsError, errors.InvalidArgument) as error:
        give_up(program, 2, str(error))


def give_up(program: str, code: int, message: str) -> NoReturn:
    """Ends the process with one line on standard error."""
    sys.stderr.write(f"{program}: {message}\n")
    raise SystemExit(code)


def event_loop_runner() -> asyncio.Runner:
    """Returns a runner on uvloop, which every process uses."""
    return asyncio.Runner(loop_factory=uvloop.new_event_loop)


def read_token(path: Path) -> str:
    """Reads a token from its file.

    Raises:
        ValueError: The file cannot be read, is empty or holds none; with the remedy.
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
