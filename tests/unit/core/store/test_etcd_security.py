"""TLS, client certificates, and etcd's user and password, against a real etcd."""

import asyncio
import subprocess
from collections.abc import Iterator
from contextlib import aclosing
from pathlib import Path

import pytest
import structlog
from pydantic import SecretStr, ValidationError

from core.store import (
    EtcdSettings,
    EtcdStore,
    Put,
    StoreError,
    StoreUnavailable,
    find_etcd_binary,
)
from tests.support.etcd import EtcdProcess

PASSWORD = "correct-horse"


def _openssl(folder: Path, *arguments: str) -> None:
    subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)


def _certificate(folder: Path, name: str, extension: str) -> None:
    request = ["req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    _openssl(folder, *request, "-keyout", f"{name}.key", "-out", f"{name}.csr", "-subj", f"/CN={name}")
    (folder / f"{name}.ext").write_text(extension)
    signing = ["x509", "-req", "-days", "1", "-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial"]
    _openssl(folder, *signing, "-in", f"{name}.csr", "-out", f"{name}.pem", "-extfile", f"{name}.ext")


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("certificates")
    authority = ["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"]
    for name in ("ca", "stranger"):
        _openssl(
            folder,
            *authority,
            *("-nodes", "-days", "1", "-subj", f"/CN={name}"),
            *("-keyout", f"{name}.key", "-out", f"{name}.pem"),
        )
    usage = "extendedKeyUsage=serverAuth,clientAuth\n"
    _certificate(folder, "server", usage + "subjectAltName=IP:127.0.0.1,DNS:localhost\n")
    _certificate(folder, "client", usage)
    return folder


@pytest.fixture(scope="module")
def etcd(certificates: Path) -> Iterator[EtcdProcess]:
    """Speaks TLS, asks for client certificates, has authentication on."""
    tls = (certificates / "server.pem", certificates / "server.key", certificates / "ca.pem")
    with EtcdProcess(client_tls=tls, extra_arguments=["--client-cert-auth"]) as process:
        for command in (
            ["user", "add", f"root:{PASSWORD}"],
            ["user", "grant-role", "root", "root"],
            ["role", "add", "reader"],
            ["role", "grant-permission", "reader", "--prefix=true", "read", "/millrace/v1/"],
            ["user", "add", f"router:{PASSWORD}"],
            ["user", "grant-role", "router", "reader"],
            ["auth", "enable"],
        ):
            _etcdctl(process, certificates, command)
        yield process


def _etcdctl(process: EtcdProcess, certificates: Path, command: list[str]) -> None:
    binary = find_etcd_binary()
    assert binary is not None
    subprocess.run(
        [
            str(binary.parent / "etcdctl"),
            f"--endpoints=https://{process.endpoint}",
            f"--cacert={certificates / 'ca.pem'}",
            f"--cert={certificates / 'client.pem'}",
            f"--key={certificates / 'client.key'}",
            *command,
        ],
        check=True,
        capture_output=True,
        env={"ETCDCTL_API": "3"},
    )


def _settings(
    etcd: EtcdProcess,
    certificates: Path,
    *,
    username: str = "root",
    password: str = PASSWORD,
    ca: str = "ca",
    timeout_seconds: float = 5,
) -> EtcdSettings:
    return EtcdSettings(
        endpoints=(etcd.endpoint,),
        tls_ca=certificates / f"{ca}.pem",
        tls_certificate=certificates / "client.pem",
        tls_key=certificates / "client.key",
        username=username,
        password=SecretStr(password) if username else None,
        request_timeout_seconds=timeout_seconds,
    )


async def test_reads_writes_watches_and_leases_with_tls_and_password(
    etcd: EtcdProcess, certificates: Path
) -> None:
    store = await EtcdStore.connect(_settings(etcd, certificates))
    lease = await store.grant_lease(10)
    commit = await store.commit([Put("/millrace/v1/a", b"1", lease_id=lease.lease_id)])
    await lease.keep_alive()
    async with (
        asyncio.timeout(5),
        aclosing(store.watch("/millrace/v1/", start_revision=commit.revision)) as watch,
    ):
        async for batch in watch:
            if batch.events:
                break
    assert batch.events[0].key == "/millrace/v1/a"
    await store.close()


async def test_forgotten_tokens_are_renewed(etcd: EtcdProcess, certificates: Path) -> None:
    """A restarted etcd knows no tokens any more."""
    store = await EtcdStore.connect(_settings(etcd, certificates))
    start = (await store.list("/millrace/v1/")).revision + 1
    seen = asyncio.create_task(_first_event(store, start), name="watching")
    await asyncio.sleep(0.05)
    etcd.restart()
    # Both the call and the watch find their token refused.
    assert (await store.commit([Put("/millrace/v1/b", b"2")])).succeeded
    assert await asyncio.wait_for(seen, 10) == "/millrace/v1/b"
    await store.close()


async def test_a_watch_renews_its_token_by_itself(etcd: EtcdProcess, certificates: Path) -> None:
    store = await EtcdStore.connect(_settings(etcd, certificates))
    writer = await EtcdStore.connect(_settings(etcd, certificates))
    start = (await store.list("/millrace/v1/")).revision + 1
    store._channels._token = "forgotten.1"
    seen = asyncio.create_task(_first_event(store, start), name="watching")
    await writer.commit([Put("/millrace/v1/c", b"3")])
    assert await asyncio.wait_for(seen, 10) == "/millrace/v1/c"
    await store.close()
    await writer.close()


async def test_a_reader_may_read_and_not_write(etcd: EtcdProcess, certificates: Path) -> None:
    store = await EtcdStore.connect(_settings(etcd, certificates, username="router"))
    await store.list("/millrace/v1/spec/")
    with pytest.raises(StoreError, match="permission denied") as raised:
        await store.commit([Put("/millrace/v1/a", b"1")])
    assert not isinstance(raised.value, StoreUnavailable)
    with pytest.raises(StoreError, match="permission denied"):
        await _first_event(store, 1, "/elsewhere/")
    await store.close()


async def test_a_wrong_password_is_told_and_not_logged(etcd: EtcdProcess, certificates: Path) -> None:
    with structlog.testing.capture_logs() as logs, pytest.raises(StoreError) as raised:
        await EtcdStore.connect(_settings(etcd, certificates, password="hush-hush"))
    assert not isinstance(raised.value, StoreUnavailable)
    assert "hush-hush" not in f"{raised.value} {logs}"
    assert "hush-hush" not in repr(_settings(etcd, certificates, password="hush-hush"))


async def test_no_user_where_one_is_needed_is_told(etcd: EtcdProcess, certificates: Path) -> None:
    # etcd takes the name in the client certificate for the user then, and knows no such user.
    with pytest.raises(StoreError, match="permission denied") as raised:
        await EtcdStore.connect(_settings(etcd, certificates, username=""))
    assert not isinstance(raised.value, StoreUnavailable)


async def test_a_member_that_strangers_vouch_for_is_not_trusted(
    etcd: EtcdProcess, certificates: Path
) -> None:
    with pytest.raises(StoreUnavailable):
        await EtcdStore.connect(_settings(etcd, certificates, ca="stranger", timeout_seconds=0.5))


async def test_the_password_is_read_from_a_file_at_each_log_in(
    etcd: EtcdProcess, certificates: Path, tmp_path: Path
) -> None:
    file = tmp_path / "password"
    settings = _settings(etcd, certificates).model_copy(update={"password": None, "password_file": file})
    with pytest.raises(StoreError, match="cannot read"):
        await EtcdStore.connect(settings)
    file.write_text(PASSWORD + "\n")
    store = await EtcdStore.connect(settings)
    await store.close()


async def _first_event(store: EtcdStore, start: int, prefix: str = "/millrace/v1/") -> str:
    async with aclosing(store.watch(prefix, start_revision=start)) as watch:
        async for batch in watch:
            for event in batch.events:
                return event.key
    raise AssertionError("the watch ended")


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"endpoints": []}, "at least 1"),
        ({"endpoints": ["http://localhost:2379"]}, "not host:port"),
        ({"endpoints": ["localhost"]}, "not host:port"),
        ({"endpoints": ["a:1"], "tls_certificate": "x"}, "go together"),
        ({"endpoints": ["a:1"], "tls_certificate": "x", "tls_key": "y"}, "needs tls_ca"),
        ({"endpoints": ["a:1"], "username": "x"}, "go together"),
        ({"endpoints": ["a:1"], "password": "x"}, "go together"),
        (
            {"endpoints": ["a:1"], "username": "u", "password": "x", "password_file": "y"},
            "either",
        ),
        ({"endpoints": ["a:1"], "request_timeout_seconds": 0}, "greater than 0"),
        ({"endpoints": ["a:1"], "tls": True}, "Extra inputs"),
    ],
)
def test_settings_that_cannot_work_are_refused(values: dict[str, object], reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        EtcdSettings.model_validate(values)


def test_a_missing_certificate_is_named(tmp_path: Path) -> None:
    settings = EtcdSettings(endpoints=("a:1",), tls_ca=tmp_path / "absent.pem")
    with pytest.raises(StoreError, match=r"absent\.pem"):
        EtcdStore(settings)
