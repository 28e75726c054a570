"""Who may do what in etcd: users, roles, and turning authentication on. Running it again is safe.

In come the folder and the members' addresses, out go calls of `etcdctl` as root. Node agents are no users:
a stolen GPU machine must not hold keys of the cluster.
"""

import asyncio
import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from core.store import EtcdSettings, EtcdStore, StoreError, find_etcd_binary, keys
from deploy.etcd.layout import Layout

ROOT_USER = "root"
# An election after a start takes a second or two; etcdctl's own default of 5 s would end before.
COMMAND_SECONDS = 20


class EtcdctlError(Exception):
    """etcdctl is missing or was refused; the text says what to do."""


@dataclass(frozen=True, slots=True)
class User:
    """A user with a role of the same name.

    Attributes:
        name: Of user, role, and the subject of its certificate.
        reads: Prefixes that it may read.
        writes: Prefixes that it may read and write.
    """

    name: str
    reads: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()


USERS = (
    User("controlplane", writes=(keys.ROOT,)),
    # A router learns whom to serve and where, and says that it lives.
    User(
        "router",
        reads=(keys.ROOT + "spec/", keys.ROOT + "serve/", keys.STATS),
        writes=(keys.LIVE_ROUTERS,),
    ),
)


class Etcdctl:
    """Calls etcdctl as root, who is named by the certificate."""

    def __init__(self, layout: Layout, endpoints: Sequence[str]) -> None:
        """Takes the folder and the members' host:port.

        Raises:
            EtcdctlError: There is no etcdctl.
        """
        self._folder = layout.client(ROOT_USER)
        self._endpoints = ",".join(endpoints)
        self._binary = find_etcdctl()

    def __call__(self, *arguments: str, standard_input: str = "") -> str:
        """Runs a command and returns what it printed.

        Raises:
            EtcdctlError: It was refused.
        """
        done = subprocess.run(
            [
                str(self._binary),
                f"--endpoints={self._endpoints}",
                f"--cacert={self._folder / 'ca.pem'}",
                f"--cert={self._folder / 'client.pem'}",
                f"--key={self._folder / 'client.key'}",
                "--command-timeout=10s",
                *arguments,
            ],
            check=False,
            capture_output=True,
            text=True,
            input=standard_input,
            timeout=COMMAND_SECONDS,
            env={"ETCDCTL_API": "3", "PATH": os.environ.get("PATH", "")},
        )
        if done.returncode != 0:
            raise EtcdctlError(f"etcdctl {' '.join(arguments[:3])} failed: {done.stderr.strip()[-500:]}")
        return done.stdout


def find_etcdctl() -> Path:
    """Finds the etcdctl beside the etcd that Millrace uses.

    Raises:
        EtcdctlError: There is none.
    """
    etcd = find_etcd_binary()
    beside = etcd.parent / "etcdctl" if etcd is not None else None
    if beside is None or not beside.exists():
        raise EtcdctlError("no etcdctl beside etcd: install both on PATH, then run this again")
    return beside


def secure(layout: Layout, endpoints: Sequence[str]) -> None:
    """Makes users and roles and turns authentication on; what is there is kept.

    A password is set when its user is made and whenever the file holds another one than etcd knows.

    Raises:
        EtcdctlError: etcd does not answer or refuses.
    """
    etcdctl = Etcdctl(layout, endpoints)
    known_users, known_roles = etcdctl("user", "list").split(), etcdctl("role", "list").split()
    if ROOT_USER not in known_users:
        # root is who holds the certificate of that name; there is no password to guess.
        etcdctl("user", "add", ROOT_USER, "--no-password")
        etcdctl("user", "grant-role", ROOT_USER, ROOT_USER)
    for user in USERS:
        if user.name not in known_roles:
            etcdctl("role", "add", user.name)
        for prefix in user.reads:
            etcdctl("role", "grant-permission", user.name, "--prefix=true", "read", prefix)
        for prefix in user.writes:
            etcdctl("role", "grant-permission", user.name, "--prefix=true", "readwrite", prefix)
        password = layout.password(user.name).read_text().strip()
        # On standard input, since arguments stand in the process list.
        if user.name not in known_users:
            etcdctl("user", "add", user.name, "--interactive=false", standard_input=password)
        elif not _knows(layout, endpoints, user.name):
            etcdctl("user", "passwd", user.name, "--interactive=false", standard_input=password)
        etcdctl("user", "grant-role", user.name, user.name)
    if "Authentication Status: true" not in etcdctl("auth", "status"):
        etcdctl("auth", "enable")


def _knows(layout: Layout, endpoints: Sequence[str], user: str) -> bool:
    """Tells whether etcd takes the password in a user's file; true where that cannot be found out."""
    folder = layout.client(user)
    settings = EtcdSettings(
        endpoints=tuple(endpoints),
        tls_ca=folder / "ca.pem",
        tls_certificate=folder / "client.pem",
        tls_key=folder / "client.key",
        username=user,
        password_file=layout.password(user),
    )

    async def log_in() -> bool:
        store = EtcdStore(settings)
        try:
            await store.get(keys.live_router("nobody"))
        except StoreError as error:
            return "authentication failed" not in str(error)
        finally:
            await store.close()
        return True

    return asyncio.run(log_in())
