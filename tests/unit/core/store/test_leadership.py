import asyncio

import pytest
from millrace.state.v1 import records_pb2

from core.errors import FailedPrecondition
from core.store import Commit, Delete, Leadership, MemoryStore, Put, keys
from core.tasks import cancel_and_wait
from tests.support.clock import ManualClock
from tests.support.waiting import eventually

TTL_SECONDS = 5


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def store(clock: ManualClock) -> MemoryStore:
    return MemoryStore(clock)


def _candidate(store: MemoryStore, clock: ManualClock, member_id: str) -> Leadership:
    payload = records_pb2.LeaderRecord(grpc_target=f"{member_id}:7600")
    return Leadership(store, member_id, payload, clock=clock, ttl_seconds=TTL_SECONDS)


async def _write_as(store: MemoryStore, leader: Leadership) -> Commit:
    return await store.commit([Put("/plan/x", b"")], compares=[leader.compare()])


async def _leader(store: MemoryStore) -> records_pb2.LeaderRecord | None:
    found = await store.get(keys.LIVE_LEADER)
    return records_pb2.LeaderRecord.FromString(found.value) if found else None


async def test_the_first_candidate_leads_and_says_who_it_is(store: MemoryStore, clock: ManualClock) -> None:
    leader = _candidate(store, clock, "one")
    with pytest.raises(FailedPrecondition):
        leader.compare()
    fencing = await leader.acquire()
    found = await store.get(keys.LIVE_LEADER)
    assert found is not None
    assert found.create_revision == fencing
    record = await _leader(store)
    assert record is not None
    assert (record.member_id, record.grpc_target) == ("one", "one:7600")
    assert record.acquire_time.ToDatetime(tzinfo=clock.now().tzinfo) == clock.now()
    assert leader.held
    assert (await _write_as(store, leader)).succeeded
    await leader.resign()
    assert leader.lost.is_set()
    assert await _leader(store) is None
    assert not (await _write_as(store, leader)).succeeded


async def test_the_lead_lasts_while_it_is_renewed(store: MemoryStore, clock: ManualClock) -> None:
    leader = _candidate(store, clock, "one")
    await leader.acquire()
    for _ in range(20):
        await clock.advance(TTL_SECONDS / 3)
    assert leader.held
    assert (await _write_as(store, leader)).succeeded
    await leader.resign()


async def test_another_candidate_waits_and_fences_off_the_old_leader(
    store: MemoryStore, clock: ManualClock
) -> None:
    old, new = _candidate(store, clock, "one"), _candidate(store, clock, "two")
    old_fencing = await old.acquire()
    campaign = asyncio.create_task(new.acquire(), name="campaign")
    for _ in range(5):
        await clock.advance(2)
    assert not campaign.done()
    # The old leader hangs: its renewals stop, it knows of nothing.
    await cancel_and_wait(old._renewal)
    await clock.advance(TTL_SECONDS + 1)
    await eventually(campaign.done)
    new_fencing = campaign.result()
    assert new_fencing > old_fencing
    assert not (await _write_as(store, old)).succeeded
    assert (await _write_as(store, new)).succeeded
    await old.resign()
    assert (await _write_as(store, new)).succeeded
    await new.resign()


async def test_a_resigned_lead_is_taken_at_once(store: MemoryStore, clock: ManualClock) -> None:
    old, new = _candidate(store, clock, "one"), _candidate(store, clock, "two")
    await old.acquire()
    campaign = asyncio.create_task(new.acquire(), name="campaign")
    await clock.advance(0.1)
    before = clock.monotonic()
    await old.resign()
    await eventually(campaign.done)
    assert clock.monotonic() == before
    assert new.held
    await new.resign()


async def test_a_restarted_member_takes_over_from_itself_at_once(
    store: MemoryStore, clock: ManualClock
) -> None:
    former = _candidate(store, clock, "one")
    former_fencing = await former.acquire()
    await cancel_and_wait(former._renewal)
    before = clock.monotonic()
    present = _candidate(store, clock, "one")
    assert await present.acquire() > former_fencing
    assert clock.monotonic() == before
    assert not (await _write_as(store, former)).succeeded
    assert (await _write_as(store, present)).succeeded
    # The former life's lease expires; the key is on the new one.
    await clock.advance(TTL_SECONDS * 2)
    assert present.held
    await present.resign()


async def test_an_outage_longer_than_the_ttl_loses_the_lead_by_our_own_clock(
    store: MemoryStore, clock: ManualClock
) -> None:
    leader = _candidate(store, clock, "one")
    await leader.acquire()
    store.set_available(False)
    await clock.advance(TTL_SECONDS - 0.5)
    assert leader.held
    await clock.advance(0.6)
    assert leader.lost.is_set()
    store.set_available(True)
    again = await leader.acquire()
    assert leader.held
    assert leader.compare().create_revision == again
    assert (await _write_as(store, leader)).succeeded
    await leader.resign()


async def test_a_short_outage_does_not_lose_the_lead(store: MemoryStore, clock: ManualClock) -> None:
    leader = _candidate(store, clock, "one")
    fencing = await leader.acquire()
    store.set_available(False)
    await clock.advance(TTL_SECONDS / 2)
    store.set_available(True)
    await clock.advance(TTL_SECONDS * 4)
    assert leader.held
    assert leader.compare().create_revision == fencing
    await leader.resign()


async def test_a_renewal_that_hangs_does_not_delay_the_loss(clock: ManualClock) -> None:
    class Hanging(MemoryStore):
        hang = False

        async def keep_alive(self, lease_id: int) -> None:
            if self.hang:
                await asyncio.Event().wait()
            await super().keep_alive(lease_id)

    store = Hanging(clock)
    leader = _candidate(store, clock, "one")
    await leader.acquire()
    store.hang = True
    await clock.advance(TTL_SECONDS + 0.1)
    assert leader.lost.is_set()
    await leader.resign()


async def test_losing_the_key_or_the_lease_is_noticed_at_the_next_renewal(
    store: MemoryStore, clock: ManualClock
) -> None:
    leader = _candidate(store, clock, "one")
    await leader.acquire()
    await store.commit([Delete(keys.LIVE_LEADER)])
    await clock.advance(TTL_SECONDS / 2)
    assert leader.lost.is_set()
    await leader.acquire()
    found = await store.get(keys.LIVE_LEADER)
    assert found is not None
    store.expire_lease(found.lease_id)
    await clock.advance(TTL_SECONDS / 2)
    assert leader.lost.is_set()
    await leader.resign()


async def test_many_candidates_never_write_under_two_leaders(store: MemoryStore, clock: ManualClock) -> None:
    candidates = [_candidate(store, clock, f"member-{number}") for number in range(5)]
    campaigns = {each: asyncio.create_task(each.acquire(), name="campaign") for each in candidates}
    fencings: list[int] = []
    while campaigns:
        await eventually(lambda: any(task.done() for task in campaigns.values()))
        done = [each for each, task in campaigns.items() if task.done()]
        assert len(done) == 1
        leader = done[0]
        fencings.append(campaigns.pop(leader).result())
        assert (await _write_as(store, leader)).succeeded
        await leader.resign()
    assert fencings == sorted(set(fencings))


async def test_a_campaign_outlives_an_outage(store: MemoryStore, clock: ManualClock) -> None:
    old, new = _candidate(store, clock, "one"), _candidate(store, clock, "two")
    await old.acquire()
    campaign = asyncio.create_task(new.acquire(), name="campaign")
    await clock.advance(0.1)
    store.set_available(False)
    for _ in range(8):
        await clock.advance(5)
    store.set_available(True)
    for _ in range(4):
        await clock.advance(2)
    await eventually(campaign.done)
    assert new.held
    assert not old.held
    await old.resign()
    await new.resign()
