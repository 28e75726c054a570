"""Makes the files of a cluster: authority, certificates, configuration, passwords. Running it again is safe.

In come members and a folder, out come files; secrets are readable by their owner only. Nothing is started.
"""

import secrets
import shutil
from pathlib import Path

from deploy.etcd.certificates import Authority, Certificate
from deploy.etcd.layout import Layout, Member, member_configuration
from deploy.etcd.users import ROOT_USER, USERS

LOOPBACK = ("127.0.0.1", "localhost")


def prepare(directory: Path, members: tuple[Member, ...]) -> Layout:
    """Makes or completes the files of a cluster.

    Args:
        directory: Where; made with mode 0700.
        members: All members.

    Raises:
        OpensslError: openssl is missing or refused.
        ValueError: Two members have one name, or one address.
    """
    _check(members)
    layout = Layout(directory)
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    authority = Authority(layout.authority)
    authority.ensure()
    for member in members:
        folder = layout.member(member.name)
        hosts = tuple(dict.fromkeys((member.host, *LOOPBACK)))
        # Without a subject: etcd's own calls to itself must not count as a user of that name.
        authority.ensure_signed(folder, Certificate("server", hosts=hosts, server=True, client=True))
        authority.ensure_signed(folder, Certificate("peer", hosts=hosts, server=True, client=True))
        shutil.copyfile(authority.certificate, folder / "ca.pem")
        (folder / "etcd.yml").write_text(member_configuration(layout, member, members))
        (folder / "data").mkdir(mode=0o700, exist_ok=True)
    for user in (ROOT_USER, *(each.name for each in USERS)):
        folder = layout.client(user)
        authority.ensure_signed(folder, Certificate("client", common_name=user, client=True))
        shutil.copyfile(authority.certificate, folder / "ca.pem")
        _ensure_password(layout.password(user))
    return layout


def _check(members: tuple[Member, ...]) -> None:
    if len({each.name for each in members}) != len(members):
        raise ValueError("--member: two members have one name; give each its own")
    if len({each.client_endpoint for each in members}) != len(members):
        raise ValueError("--member: two members have one address; give each its own host or ports")
    if len(members) % 2 == 0:
        raise ValueError(
            f"--member: {len(members)} members survive no more losses than {len(members) - 1}: "
            "take an odd number"
        )


def _ensure_password(path: Path) -> None:
    if path.exists() and path.read_text().strip():
        return
    path.touch(mode=0o600)
    path.chmod(0o600)
    path.write_text(secrets.token_hex(32) + "\n")
