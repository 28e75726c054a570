"""A three-member etcd with TLS and users: who may do what is decided by etcd itself."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import pytest

from core.store import EtcdSettings, EtcdStore, Put, StoreError, StoreUnavailable, keys
from deploy.etcd.layout import Layout
from deploy.etcd.members import MemberProcess
from deploy.etcd.users import Etcdctl, secure
from tests.chaos.cluster import secure_etcd
from tests.support.waiting import eventually

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def etcd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Layout, list[MemberProcess]]]:
    with secure_etcd(tmp_path_factory.mktemp("secure") / "etcd") as made:
        yield made


@asynccontextmanager
async def _store(
    layout: Layout,
    members: list[MemberProcess],
    user: str,
    *,
    password: bool = False,
    certificate: bool = True,
) -> AsyncIterator[EtcdStore]:
    folder = layout.client(user)
    store = EtcdStore(
        EtcdSettings(
            endpoints=tuple(each.member.client_endpoint for each in members),
            tls_ca=folder / "ca.pem",
            tls_certificate=folder / "client.pem" if certificate else None,
            tls_key=folder / "client.key" if certificate else None,
            username=user if password else "",
            password_file=layout.password(user) if password else None,
            request_timeout_seconds=3,
        )
    )
    try:
        yield store
    finally:
        await store.close()


async def test_each_user_may_do_what_it_needs_and_no_more(
    etcd: tuple[Layout, list[MemberProcess]],
) -> None:
    layout, members = etcd
    async with _store(layout, members, "controlplane") as store:
        written = [Put(keys.spec_deployment("team", "chat"), b"spec"), Put(keys.PLAN_REPLICAS + "a", b"plan")]
        assert (await store.commit(written)).succeeded
        with pytest.raises(StoreError, match="permission denied"):
            await store.commit([Put("/elsewhere", b"")])
    for password in (False, True):
        async with _store(layout, members, "router", password=password) as store:
            assert [item.value for item in (await store.list(keys.SPEC_DEPLOYMENTS)).items] == [b"spec"]
            lease = await store.grant_lease(10)
            alive = Put(keys.live_router("r"), b"here", lease_id=lease.lease_id)
            assert (await store.commit([alive])).succeeded
            await lease.keep_alive()
            await lease.revoke()
            for prefix in (keys.PLAN_REPLICAS, keys.ACTUAL_NODES, keys.EVENTS):
                with pytest.raises(StoreError, match="permission denied"):
                    await store.list(prefix)
            for key in (
                keys.spec_deployment("team", "chat"),
                keys.stats("team", "chat", "a"),
                keys.LIVE_LEADER,
            ):
                with pytest.raises(StoreError, match="permission denied") as refused:
                    await store.commit([Put(key, b"mine")])
                assert not isinstance(refused.value, StoreUnavailable)
    # Without a certificate of ours nobody gets as far as being refused.
    async with _store(layout, members, "router", password=True, certificate=False) as store:
        with pytest.raises(StoreUnavailable):
            await store.get(keys.spec_deployment("team", "chat"))


async def test_securing_again_keeps_what_is_and_takes_a_new_password(
    etcd: tuple[Layout, list[MemberProcess]],
) -> None:
    layout, members = etcd
    endpoints = [each.member.client_endpoint for each in members]
    etcdctl = Etcdctl(layout, endpoints)
    before = await asyncio.to_thread(etcdctl, "role", "get", "router")
    await asyncio.to_thread(secure, layout, endpoints)
    assert await asyncio.to_thread(etcdctl, "role", "get", "router") == before
    layout.password("router").write_text("another-password\n")
    async with _store(layout, members, "router", password=True) as store:
        with pytest.raises(StoreError, match="authentication failed"):
            await store.list(keys.SPEC_DEPLOYMENTS)
        await asyncio.to_thread(secure, layout, endpoints)
        await store.list(keys.SPEC_DEPLOYMENTS)


async def test_users_outlive_the_loss_of_any_member(etcd: tuple[Layout, list[MemberProcess]]) -> None:
    layout, members = etcd
    async with _store(layout, members, "router", password=True) as store:
        for number, member in enumerate(members):
            member.kill()

            async def written(number: int = number) -> bool:
                try:
                    return (await store.commit([Put(keys.live_router(str(number)), b"")])).succeeded
                except StoreUnavailable:
                    return False

            await eventually(written, timeout_seconds=15)
            member.spawn()
            await asyncio.to_thread(member.wait_healthy)
        assert len((await store.list(keys.LIVE_ROUTERS)).items) == len(members)
