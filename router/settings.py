"""Options of the router: command line, environment (`MILLRACE_ROUTER_...`), defaults with their reasons.

In come strings, out come checked values, or one line that names the wrong option. Secrets are given as
files, never as values.
"""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from core.clock import Clock
from core.rpc import TlsFiles
from core.settings import EtcdOptions, LogOptions, Port, process_configuration, read_token
from router.admission.gate import Bounds
from router.prefix.exact.index import ExactIndex
from router.upstream.forward import Timeouts

MEBIBYTE = 1024 * 1024

Seconds = Annotated[float, Field(gt=0, le=86_400)]


class RouterSettings(LogOptions, EtcdOptions):
    """OpenAI-compatible router in front of the ready endpoints of a Millrace cluster."""

    model_config = process_configuration("router")

    host: str = Field("127.0.0.1", description="Address to listen on; default: this machine only.")
    port: Port = Field(8080, description="Port to listen on; 0 takes a free one and logs it.")
    listen_fd: Annotated[int, Field(ge=3)] | None = Field(
        None,
        description="Listening socket inherited from the parent (systemd socket activation: 3) in place of "
        "--host and --port; connections then wait through a restart instead of being refused.",
    )
    workers: Annotated[int, Field(ge=1, le=256)] = Field(
        1, description="Processes that share the port; one uses about one core."
    )
    public_url: str = Field(
        "", description="Base URL that clients use, without /v1; default: http://HOST:PORT."
    )
    strategy: str = Field(
        "default",
        description="Picking plug-ins, separated by commas, a scorer's with a weight where wanted "
        "(prefix=3,kv=2,load=2), or `default`: prefix, KV and load in one cost.",
    )
    prefix_index: Literal["approximate", "exact"] = Field(
        "approximate",
        description="What is known of engines' caches: approximate learns from what is sent; exact also "
        "reads the KV events of engines that publish some and asks them for prompts' tokens, which may take "
        "a request 5 ms.",
    )
    agent_token_file: Path | None = Field(
        None, description="File with the router token that node agents know; for --prefix-index exact."
    )
    agent_tls_certificate: Path | None = Field(None, description="PEM file of our certificate for agents.")
    agent_tls_key: Path | None = Field(None, description="PEM file of its key.")
    agent_tls_authority: Path | None = Field(None, description="PEM file of authorities; checks agents.")
    connect_timeout_seconds: Seconds = Field(
        2.0, description="Until a connection to an engine stands; engines are near, so longer means trouble."
    )
    first_byte_timeout_seconds: Seconds = Field(
        120.0, description="Until an engine's first byte of a stream; covers its queue and a long prompt."
    )
    whole_answer_timeout_seconds: Seconds = Field(
        600.0,
        description="The same for answers without streaming, whose first byte comes when all is done; "
        "600 is the OpenAI client's own default.",
    )
    idle_timeout_seconds: Seconds = Field(
        60.0, description="Between two pieces of an answer, from the engine or to the client."
    )
    body_timeout_seconds: Seconds = Field(
        60.0, description="Until a request's body has come completely; bounds slow uploads."
    )
    drain_seconds: Seconds = Field(
        30.0, description="After SIGTERM: how long requests in flight may take to end."
    )
    request_body_bytes_max: Annotated[int, Field(ge=1024, le=1024 * MEBIBYTE)] = Field(
        32 * MEBIBYTE, description="Largest request body, bytes; leaves room for a few images."
    )
    requests_in_flight_max: Annotated[int, Field(ge=1, le=1_000_000)] = Field(
        4096, description="Requests that one worker holds at once; bounds its memory and its sockets."
    )
    queue_requests_max: Annotated[int, Field(ge=0, le=100_000)] = Field(
        256,
        description="Requests that one worker lets wait for one deployment while all its endpoints are "
        "saturated or none is there; 0 refuses at once. A deployment may say its own.",
    )
    queue_bytes_max: Annotated[int, Field(ge=0)] = Field(
        256 * MEBIBYTE, description="Bodies of all requests that wait in one worker, bytes."
    )
    queue_timeout_seconds: Seconds = Field(
        30.0,
        description="Longest wait while all endpoints are saturated; clients that are told to come again "
        "get further than those that wait longer. A deployment may say its own.",
    )
    parking_timeout_seconds: Seconds = Field(
        120.0,
        description="Longest wait while a deployment has no endpoint; covers the start of an engine whose "
        "weights are there. A deployment may say its own.",
    )
    expected_start_seconds: Seconds = Field(
        60.0,
        description="How long a deployment takes to start, for Retry-After, until a start was measured.",
    )
    admin_token_file: Path | None = Field(
        None,
        description="File with the admin token; turns on GET /debug/endpoints and "
        "/debug/decisions/{request_id} for its bearer.",
    )

    @field_validator("admin_token_file", "agent_token_file")
    @classmethod
    def _check_token_file(cls, value: Path | None) -> Path | None:
        if value is not None:
            read_token(value)
        return value

    @model_validator(mode="after")
    def _check_exact(self) -> Self:
        if self.prefix_index == "exact" and self.agent_token_file is None:
            raise ValueError("--prefix-index exact needs --agent-token-file, which agents ask routers for")
        if (self.agent_tls_certificate is None) != (self.agent_tls_key is None):
            raise ValueError("--agent-tls-certificate and --agent-tls-key come together")
        return self

    def exact_index(self, token: str, clock: Clock) -> ExactIndex | None:
        """Returns the exact prefix index; None where it is not asked for."""
        if self.prefix_index != "exact":
            return None
        tls = TlsFiles(self.agent_tls_certificate, self.agent_tls_key, self.agent_tls_authority)
        return ExactIndex(token=token, tls=tls, clock=clock)

    def bounds(self) -> Bounds:
        """Returns the bounds of waiting."""
        return Bounds(
            requests_max=self.queue_requests_max,
            bytes_max=self.queue_bytes_max,
            queue_seconds=self.queue_timeout_seconds,
            parking_seconds=self.parking_timeout_seconds,
            start_seconds=self.expected_start_seconds,
        )

    def timeouts(self) -> Timeouts:
        """Returns the bounds of an attempt."""
        return Timeouts(
            connect_seconds=self.connect_timeout_seconds,
            first_byte_seconds=self.first_byte_timeout_seconds,
            whole_answer_seconds=self.whole_answer_timeout_seconds,
            idle_seconds=self.idle_timeout_seconds,
        )
