"""Options and places of a local stack.

In come command-line options, out come checked values and the paths of everything that the stack writes.
All of it lives below one folder, `.millrace` where the command is run.
"""

import argparse
import secrets
import socket
from dataclasses import dataclass
from pathlib import Path

BUNDLED_MODEL = Path(__file__).resolve().parents[1] / "models" / "millrace-tiny"
NAMESPACE = "default"
DEPLOYMENT = "millrace-tiny"


class UsageError(Exception):
    """The stack cannot start as asked; the text names the option and the remedy."""


@dataclass(frozen=True, slots=True)
class Options:
    """What the user chose. Ports of 0 are not allowed: clients must know where to go."""

    directory: Path
    engine: str
    replicas: int
    router_port: int
    router_workers: int
    grpc_port: int
    gateway_port: int
    agent_port: int
    agent_metrics_port: int
    etcd_port: int
    etcd_peer_port: int
    ready_seconds: float
    no_deployment: bool

    @property
    def engines(self) -> Path:
        """Folder of engine environments."""
        from deploy.local.engine_environment import default_engines_directory

        return default_engines_directory().resolve()

    @property
    def secrets(self) -> Path:
        """Folder of token files, readable by its owner only."""
        return self.directory / "secrets"

    @property
    def logs(self) -> Path:
        """Folder of the processes' logs."""
        return self.directory / "logs"

    @property
    def description(self) -> Path:
        """File that tells clients where everything is."""
        return self.directory / "local.json"

    @property
    def lock(self) -> Path:
        """File that is locked while the stack runs; holds its process id."""
        return self.directory / "up.lock"

    @property
    def router_url(self) -> str:
        """Where users send requests, without `/v1`."""
        return f"http://127.0.0.1:{self.router_port}"

    @property
    def gateway_url(self) -> str:
        """Where the control plane answers HTTP."""
        return f"http://127.0.0.1:{self.gateway_port}"

    @property
    def grpc_target(self) -> str:
        """Where the control plane answers gRPC."""
        return f"127.0.0.1:{self.grpc_port}"

    @property
    def etcd_endpoint(self) -> str:
        """Where etcd answers."""
        return f"127.0.0.1:{self.etcd_port}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of `up`."""
    ports = parser.add_argument_group("ports (all on 127.0.0.1)")
    for name, default, what in (
        ("router", 8080, "OpenAI-compatible endpoint"),
        ("grpc", 7600, "control plane, gRPC"),
        ("gateway", 7601, "control plane, HTTP"),
        ("agent", 7610, "node agent, gRPC"),
        ("etcd", 2389, "etcd, clients"),
    ):
        ports.add_argument(f"--{name}-port", type=int, default=default, help=f"{what} (default {default})")
    ports.add_argument(
        "--agent-metrics-port", type=int, default=0, help="node agent, /metrics (default: agent port + 1)"
    )
    ports.add_argument("--etcd-peer-port", type=int, default=0, help="etcd, peers (default: etcd port + 1)")
    parser.add_argument(
        "--engine",
        choices=("vllm", "simulator"),
        default="vllm",
        help="engine of the bundled model; simulator skips the installation of vLLM (default vllm)",
    )
    parser.add_argument("--replicas", type=int, default=1, help="replicas of the bundled model (default 1)")
    parser.add_argument("--router-workers", type=int, default=1, help="router processes (default 1)")
    parser.add_argument(
        "--directory",
        type=Path,
        default=Path(".millrace"),
        help="where state, logs and secrets are kept (default .millrace)",
    )
    parser.add_argument(
        "--ready-seconds",
        type=float,
        default=900.0,
        help="how long to wait for the bundled model's first answer (default 900)",
    )
    parser.add_argument(
        "--no-deployment", action="store_true", help="start the processes and declare nothing"
    )


def from_arguments(arguments: argparse.Namespace) -> Options:
    """Checks the options.

    Raises:
        UsageError: A value is out of range.
    """
    options = Options(
        directory=arguments.directory.resolve(),
        engine=arguments.engine,
        replicas=arguments.replicas,
        router_port=arguments.router_port,
        router_workers=arguments.router_workers,
        grpc_port=arguments.grpc_port,
        gateway_port=arguments.gateway_port,
        agent_port=arguments.agent_port,
        agent_metrics_port=arguments.agent_metrics_port or arguments.agent_port + 1,
        etcd_port=arguments.etcd_port,
        etcd_peer_port=arguments.etcd_peer_port or arguments.etcd_port + 1,
        ready_seconds=arguments.ready_seconds,
        no_deployment=arguments.no_deployment,
    )
    if options.router_workers < 1 or options.router_workers > 64:
        raise UsageError(f"--router-workers {options.router_workers}: give 1 to 64")
    if options.replicas < 1 or options.replicas > 16:
        raise UsageError(f"--replicas {options.replicas}: give 1 to 16")
    seen: dict[int, str] = {}
    for option, port in ports(options):
        if not 1 <= port <= 65535:
            raise UsageError(f"{option} {port}: give a port from 1 to 65535")
        if port in seen:
            raise UsageError(f"{option} and {seen[port]} are both {port}: give them different ports")
        seen[port] = option
    return options


def ports(options: Options) -> tuple[tuple[str, int], ...]:
    """Every port with the option that sets it."""
    return (
        ("--router-port", options.router_port),
        ("--grpc-port", options.grpc_port),
        ("--gateway-port", options.gateway_port),
        ("--agent-port", options.agent_port),
        ("--agent-metrics-port", options.agent_metrics_port),
        ("--etcd-port", options.etcd_port),
        ("--etcd-peer-port", options.etcd_peer_port),
    )


def require_free_ports(options: Options) -> None:
    """Refuses to start where a port is taken.

    Raises:
        UsageError: Names the port and the option.
    """
    for option, port in ports(options):
        with socket.socket() as probe:
            # Ports of connections that have just ended are free in every sense that matters.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                variable = option.removeprefix("--").replace("-", "_").upper()
                raise UsageError(
                    f"port {port} is taken: stop what listens there, or choose another with "
                    f"{option} N (make up {variable}=N)"
                ) from None


def token_file(options: Options, name: str) -> Path:
    """Returns a token file, made on first use with 256 random bits, readable by its owner only."""
    options.secrets.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = options.secrets / name
    if not path.exists():
        path.touch(mode=0o600)
        path.write_text(secrets.token_hex(32) + "\n")
    return path
