"""Certificates, configuration and passwords of an etcd cluster, as files; no etcd runs here."""

import json
import subprocess
from pathlib import Path

import pytest

from deploy.etcd.__main__ import local_members, main, parse_member
from deploy.etcd.layout import Layout, Member
from deploy.etcd.prepare import prepare

MEMBERS = tuple(Member(f"etcd-{number}", f"10.0.0.{number}") for number in (1, 2, 3))


@pytest.fixture(scope="module")
def layout(tmp_path_factory: pytest.TempPathFactory) -> Layout:
    return prepare(tmp_path_factory.mktemp("etcd") / "cluster", MEMBERS)


def _text(certificate: Path) -> str:
    command = ["openssl", "x509", "-noout", "-text", "-in", str(certificate)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def test_secrets_are_for_their_owner_only(layout: Layout) -> None:
    secrets = [*layout.directory.rglob("*.key"), *layout.directory.rglob("password")]
    assert len(secrets) == 1 + 2 * 3 + 2 * 3
    assert {path.stat().st_mode & 0o777 for path in secrets} == {0o600}
    assert layout.directory.stat().st_mode & 0o777 == 0o700
    assert len({layout.password(user).read_text() for user in ("root", "controlplane", "router")}) == 3


def test_preparing_again_changes_nothing(layout: Layout) -> None:
    before = {path: path.read_bytes() for path in layout.directory.rglob("*") if path.is_file()}
    prepare(layout.directory, MEMBERS)
    assert {path: path.read_bytes() for path in layout.directory.rglob("*") if path.is_file()} == before


def test_a_member_that_moved_gets_a_new_certificate_and_keeps_its_key(layout: Layout) -> None:
    folder = layout.member("etcd-3")
    key, authority = (folder / "server.key").read_bytes(), layout.authority / "ca.pem"
    trusted = authority.read_bytes()
    moved = (*MEMBERS[:2], Member("etcd-3", "etcd.example"))
    prepare(layout.directory, moved)
    assert "DNS:etcd.example" in _text(folder / "server.pem")
    assert (folder / "server.key").read_bytes() == key
    assert authority.read_bytes() == trusted
    prepare(layout.directory, MEMBERS)
    assert "IP Address:10.0.0.3" in _text(folder / "server.pem")


def test_a_client_is_named_and_a_member_is_not(layout: Layout) -> None:
    """etcd takes the subject for the user: a member's own certificate must not be one."""
    assert "CN = router" in _text(layout.client("router") / "client.pem").replace("CN=router", "CN = router")
    assert (
        "CN" not in _text(layout.member("etcd-1") / "server.pem").partition("Subject:")[2].partition("\n")[0]
    )


def test_a_member_asks_everybody_for_a_certificate(layout: Layout) -> None:
    told = json.loads((layout.member("etcd-1") / "etcd.yml").read_text())
    assert told["client-transport-security"]["client-cert-auth"] is True
    assert told["peer-transport-security"]["client-cert-auth"] is True
    assert told["listen-metrics-urls"].startswith("http://127.0.0.1:")
    assert told["initial-cluster"].count("https://") == 3


@pytest.mark.parametrize(
    ("text", "member"),
    [("a=host", Member("a", "host")), ("a=10.0.0.1:1:2", Member("a", "10.0.0.1", 1, 2))],
)
def test_members_are_read(text: str, member: Member) -> None:
    assert parse_member(text) == member


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        (["a"], "not NAME=HOST"),
        (["a=host:1"], "not NAME=HOST"),
        (["a=host:0:1"], "ports are numbers"),
        (["a=one", "b=two"], "odd number"),
        (["a=one", "a=two", "c=three"], "one name"),
        (["a=one", "b=one", "c=three"], "one address"),
    ],
)
def test_members_that_make_no_cluster_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], members: list[str], reason: str
) -> None:
    options = [word for member in members for word in ("--member", member)]
    try:
        code = main(["prepare", "--directory", str(tmp_path / "cluster"), *options])
    except SystemExit as ended:
        code = int(str(ended.code))
    assert code != 0
    assert reason in capsys.readouterr().err
    assert not (tmp_path / "cluster").exists()


def test_local_members_share_no_port() -> None:
    members = local_members(23790)
    ports = [port for each in members for port in (each.client_port, each.peer_port, each.metrics_port)]
    assert len(set(ports)) == 9
