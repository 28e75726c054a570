"""Where everything of the cluster lies, and what each member is told. No I/O but writing those files.

In come members (name and host) and a folder, out come paths, etcd's configuration files and the addresses.
"""

import json
from dataclasses import dataclass
from pathlib import Path

CLIENT_PORT = 2379
PEER_PORT = 2380
METRICS_PORT = 2381
# etcd's default quota is 2 GiB; upstream recommends 8 GiB at most.
QUOTA_BYTES = 8 * 1024**3
# A mirror that was away for longer lists again.
COMPACTION_RETENTION = "1h"
# Quiet prefixes stay resumable only if their watches hear of later revisions.
PROGRESS_NANOSECONDS = 5 * 10**9


@dataclass(frozen=True, slots=True)
class Member:
    """One member of the cluster.

    Attributes:
        name: Unique name.
        host: Address or DNS name at which the others, and clients, reach it.
        client_port: Port for clients.
        peer_port: Port for the other members.
        metrics_port: Port for /health and /metrics, on the member's own machine only, without TLS.
    """

    name: str
    host: str
    client_port: int = CLIENT_PORT
    peer_port: int = PEER_PORT
    metrics_port: int = METRICS_PORT

    @property
    def client_endpoint(self) -> str:
        """host:port for clients."""
        return f"{self.host}:{self.client_port}"

    @property
    def client_url(self) -> str:
        """URL for clients."""
        return f"https://{self.client_endpoint}"

    @property
    def peer_url(self) -> str:
        """URL for the other members."""
        return f"https://{self.host}:{self.peer_port}"

    @property
    def health_url(self) -> str:
        """URL that answers 200 once the member serves; on its own machine only."""
        return f"http://127.0.0.1:{self.metrics_port}/health"


@dataclass(frozen=True, slots=True)
class Layout:
    """The folder of a cluster."""

    directory: Path

    @property
    def authority(self) -> Path:
        """Our authority: its key stays on the machine that signs."""
        return self.directory / "authority"

    def member(self, name: str) -> Path:
        """What one member needs: copy it to its machine."""
        return self.directory / "members" / name

    def client(self, user: str) -> Path:
        """What one user needs: copy it to the processes that act as that user."""
        return self.directory / "clients" / user

    def password(self, user: str) -> Path:
        """A user's password file."""
        return self.client(user) / "password"


def member_configuration(layout: Layout, member: Member, members: tuple[Member, ...]) -> str:
    """Returns the file for `etcd --config-file`; JSON, which is YAML too.

    Paths are those below the folder; on another machine they are the same below wherever it was copied to.
    """
    folder = layout.member(member.name).absolute()

    def transport(kind: str) -> dict[str, object]:
        return {
            "cert-file": str(folder / f"{kind}.pem"),
            "key-file": str(folder / f"{kind}.key"),
            "trusted-ca-file": str(folder / "ca.pem"),
            "client-cert-auth": True,
        }

    # All addresses of the machine; TLS with client certificates is what protects the ports.
    any_address = "127.0.0.1" if member.host == "127.0.0.1" else "0.0.0.0"  # noqa: S104 - see above
    return (
        json.dumps(
            {
                "name": member.name,
                "data-dir": str(folder / "data"),
                "listen-client-urls": f"https://{any_address}:{member.client_port}",
                "advertise-client-urls": member.client_url,
                "listen-peer-urls": f"https://{any_address}:{member.peer_port}",
                "initial-advertise-peer-urls": member.peer_url,
                "listen-metrics-urls": f"http://127.0.0.1:{member.metrics_port}",
                "initial-cluster": ",".join(f"{each.name}={each.peer_url}" for each in members),
                "initial-cluster-state": "new",
                "initial-cluster-token": "millrace",
                "client-transport-security": transport("server"),
                "peer-transport-security": transport("peer"),
                "quota-backend-bytes": QUOTA_BYTES,
                "auto-compaction-mode": "periodic",
                "auto-compaction-retention": COMPACTION_RETENTION,
                "experimental-watch-progress-notify-interval": PROGRESS_NANOSECONDS,
                # Refuses a membership change that would leave the cluster without a majority.
                "strict-reconfig-check": True,
                "log-level": "warn",
            },
            indent=2,
        )
        + "\n"
    )
