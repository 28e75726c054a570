"""External engines: URLs that someone else runs. Probed, scraped and routed to, never started.

The metrics page is optional. Where there is one it is read with vLLM's names, which most look-alikes
use too; everything else stays unknown.
"""

from collections.abc import Sequence
from urllib.parse import urlsplit

from millrace.core.v1 import node_pb2, replica_pb2, stats_pb2, types_pb2

from nodeagent.engines.base import CannotStart, ClaimedDevice
from nodeagent.engines.metrics_text import VLLM_NAMES, parse_stats


class ExternalAdapter:
    """Watches a URL."""

    def environments(self) -> Sequence[node_pb2.EngineEnvironment]:
        """Every agent can watch a URL, with no device."""
        return [node_pb2.EngineEnvironment(engine=types_pb2.ENGINE_EXTERNAL)]

    def check(self, launch: replica_pb2.LaunchSpec, devices: Sequence[ClaimedDevice]) -> None:  # noqa: ARG002 - the protocol's signature
        """Checks the URL.

        Raises:
            CannotStart: It is not an HTTP URL, or holds a password.
        """
        parts = urlsplit(launch.external_url)
        if parts.scheme not in {"http", "https"} or not parts.hostname:
            raise CannotStart(f"extra_args.urls: {launch.external_url!r} is not of the form http://host:port")
        if parts.password is not None or parts.username is not None:
            raise CannotStart("extra_args.urls: a URL must not hold a user name or password")

    def command(
        self,
        launch: replica_pb2.LaunchSpec,  # noqa: ARG002 - the protocol's signature
        *,
        host: str,  # noqa: ARG002 - as above
        port: int,  # noqa: ARG002 - as above
        devices: Sequence[ClaimedDevice],  # noqa: ARG002 - as above
    ) -> None:
        """There is nothing to start."""
        return

    def parse_metrics(self, text: str) -> stats_pb2.EngineStats:
        """Reads a metrics page with vLLM's names."""
        return parse_stats(text, VLLM_NAMES)

    def parse_start(
        self,
        log: str,  # noqa: ARG002 - the protocol's signature
        metrics: str,  # noqa: ARG002 - as above
        launch: replica_pb2.LaunchSpec,  # noqa: ARG002 - as above
    ) -> replica_pb2.EngineFacts:
        """Knows nothing: someone else started it."""
        return replica_pb2.EngineFacts()


def base_url(url: str) -> str:
    """Returns an engine's base URL without a trailing slash or `/v1`."""
    return url.rstrip("/").removesuffix("/v1").rstrip("/")
