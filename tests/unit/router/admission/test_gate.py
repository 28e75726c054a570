"""The gate in virtual time: who is let in when, who is refused, who leaves, what the cluster is told."""

import asyncio
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pytest
from millrace.state.v1 import records_pb2

from core.tasks import cancel_and_wait
from router.admission.gate import Bounds, Gate, NotServed
from router.admission.lane import Lane
from router.admission.saturation import _Learned
from router.admission.waiter import Waiter, Word
from router.view.view import Endpoint, View, build_view
from tests.support.candidates import endpoint, sample
from tests.support.clock import ManualClock

BOUNDS = Bounds(requests_max=4, bytes_max=100, queue_seconds=10.0, parking_seconds=60.0, start_seconds=30.0)


@dataclass
class World:
    """Engines with so many places each, and a gate before them."""

    clock: ManualClock = field(default_factory=ManualClock)
    endpoints: list[Endpoint] = field(default_factory=lambda: [endpoint("r0"), endpoint("r1")])
    in_flight: dict[str, int] = field(default_factory=dict)
    order: list[str] = field(default_factory=list)
    tasks: dict[str, "asyncio.Task[str]"] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.gate = Gate(
            self.clock,
            BOUNDS,
            usable=lambda _namespace, _name: tuple(self.endpoints),
            in_flight=lambda replica: self.in_flight.get(replica, 0),
        )

    @property
    def lane(self) -> Lane:
        return self.gate.lane("a", "d")

    def limit(self, **limits: int) -> None:
        for replica, limit in limits.items():
            self.gate.saturation.limits[replica] = limit
            self.gate.saturation._learned[replica] = _Learned("i", taken_seconds=math.inf)

    def choose(self) -> str | None:
        """Picks an engine with room and counts, as a request that is sent does."""
        free = self.gate.saturation.free(self.endpoints, lambda replica: self.in_flight.get(replica, 0))
        if not free:
            return None
        replica = free[0].replica
        self.in_flight[replica] = self.in_flight.get(replica, 0) + 1
        return replica

    def ask(self, name: str, *, rank: int = 1, size: int = 1, seconds: float = 10.0) -> None:
        async def one() -> str:
            self.lane.count_in(self.clock.monotonic())
            waiter = Waiter(
                rank, 0, "k", 1, body_bytes=size, deadline_seconds=self.clock.monotonic() + seconds
            )
            replica = await self.gate.wait(self.lane, waiter, self.choose, requests_max=BOUNDS.requests_max)
            self.order.append(name)
            return replica

        self.tasks[name] = asyncio.create_task(one(), name=name)

    def end(self, replica: str) -> None:
        self.in_flight[replica] -= 1
        self.lane.ended_total += 1
        self.gate.pump(self.lane)

    async def refused(self, name: str) -> NotServed:
        with pytest.raises(NotServed) as caught:
            await self.tasks[name]
        return caught.value


@asynccontextmanager
async def _world(**limits: int) -> AsyncIterator[World]:
    """A world whose engines are full."""
    world = World()
    world.limit(**limits)
    world.in_flight.update(limits)
    runs = asyncio.create_task(world.gate.run(), name="gate")
    try:
        yield world
    finally:
        await cancel_and_wait(runs, *world.tasks.values())


async def _settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


async def test_each_end_lets_exactly_one_in() -> None:
    async with _world(r0=2, r1=1) as world:
        for name in ("one", "two", "three"):
            world.ask(name)
        await _settle()
        assert world.order == []
        world.end("r1")
        await _settle()
        assert world.order == ["one"]
        assert world.in_flight == {"r0": 2, "r1": 1}
        world.end("r0")
        world.end("r0")
        await _settle()
        assert world.order == ["one", "two", "three"]
        assert world.in_flight == {"r0": 2, "r1": 1}
        assert not world.lane.busy
        assert world.gate.waiting_bytes == 0


async def test_whoever_comes_between_the_word_and_the_sending_joins_the_line() -> None:
    async with _world(r0=1, r1=1) as world:
        world.ask("first")
        await _settle()
        world.end("r0")
        # The word is out, and the place is not free any more.
        assert world.lane.busy
        world.ask("second")
        await _settle()
        assert world.order == ["first"]


async def test_a_sample_or_an_endpoint_with_room_lets_in_as_many_as_it_has_room_for() -> None:
    async with _world(r0=1, r1=1) as world:
        for number in range(4):
            world.ask(f"{number}")
        await _settle()
        full = sample(running=1, waiting=1, own_in_flight=2)
        for _ in range(3):
            world.gate.sample_taken(world.endpoints[0], full)
        await _settle()
        # One runs and one may wait inside.
        assert world.gate.saturation.limits["r0"] == 2
        assert world.order == ["0"]
        # An engine of which nothing is known takes everybody.
        world.endpoints.append(endpoint("r2"))
        world.gate.tick()
        await _settle()
        assert world.order == ["0", "1", "2", "3"]


async def test_fast_goes_first_and_a_full_line_refuses_the_newest_ordinary_one() -> None:
    async with _world(r0=1, r1=1) as world:
        for number in range(4):
            world.ask(f"base-{number}")
        await _settle()
        world.ask("base-4")
        world.ask("fast", rank=0)
        refused = await world.refused("base-4")
        assert (refused.word, refused.bound) == (Word.PUSHED_OUT, "requests")
        assert (await world.refused("base-3")).word is Word.PUSHED_OUT
        world.end("r0")
        await _settle()
        assert world.order == ["fast"]


async def test_waits_and_bodies_are_bounded() -> None:
    async with _world(r0=1, r1=1) as world:
        world.ask("large", size=90)
        await _settle()
        world.ask("larger", size=20)
        assert (await world.refused("larger")).bound == "bytes"
        await world.clock.advance(9.9)
        assert not world.tasks["large"].done()
        await world.clock.advance(0.4)
        late = await world.refused("large")
        assert (late.word, late.bound, late.waited_seconds) == (Word.LATE, "time", 10.0)
        assert world.gate.waiting_bytes == 0
        assert not world.lane.busy


async def test_a_client_that_leaves_frees_its_place_even_with_the_word_in_its_hand() -> None:
    async with _world(r0=1, r1=1) as world:
        for name in ("leaves", "leaves late", "stays"):
            world.ask(name)
        await _settle()
        world.tasks["leaves"].cancel()
        # A waiter that has been cancelled and has not run yet must not take a place.
        world.end("r0")
        await _settle()
        assert world.order == ["leaves late"]
        world.end("r0")
        world.tasks["stays"].cancel()
        await _settle()
        assert not world.lane.busy
        assert world.lane.granted == 0
        assert world.gate.waiting_bytes == 0
        assert world.choose() == "r0"


async def test_a_place_that_is_gone_again_is_waited_for_at_the_head_of_the_line() -> None:
    async with _world(r0=1, r1=1) as world:
        world.ask("first")
        world.ask("second")
        await _settle()
        world.end("r0")
        # Somebody's retry takes the place before the waiter has come to itself.
        world.in_flight["r0"] += 1
        await _settle()
        assert world.order == []
        world.end("r0")
        await _settle()
        assert world.order == ["first"]


async def test_requests_park_for_a_deployment_without_endpoints_and_say_so_at_once() -> None:
    async with _world() as world:
        endpoints, world.endpoints[:] = list(world.endpoints), []
        world.ask("parked", seconds=60.0)
        await _settle()
        assert world.gate.parked.is_set()
        (entry,) = world.gate.demand()
        assert (entry.namespace, entry.deployment) == ("a", "d")
        assert (entry.parked_requests, entry.queued_requests, entry.requests_total) == (1, 0, 1)
        assert world.gate.waiting() == (0, 1)
        await world.clock.advance(20.0)
        lane = world.lane

        def retry(measured_seconds: float | None = None) -> int:
            return lane.start_retry_seconds(
                world.clock.monotonic(), measured_seconds=measured_seconds, default_seconds=30.0
            )

        assert retry() == 10
        # What the cluster measured is the whole start; this worker may have seen the end of one only.
        assert retry(90.0) == 70
        world.endpoints[:] = endpoints
        world.gate.view_changed(_view("d"))
        await _settle()
        assert world.order == ["parked"]
        assert lane.start_seconds == 20.0
        # The next start is expected to take as long as this one did, and less when it is overdue.
        assert retry() == 20
        lane.absent_seconds = world.clock.monotonic() - 500.0
        assert retry() == 2


async def test_those_who_wait_for_a_deleted_deployment_are_told() -> None:
    async with _world(r0=1, r1=1) as world:
        world.ask("one")
        await _settle()
        world.gate.view_changed(_view("other"))
        assert (await world.refused("one")).word is Word.GONE
        world.gate.view_changed(_view("other"))
        assert world.gate.demand() == []


async def test_demand_ends_a_minute_after_the_last_request_and_tells_diverted_ones_once() -> None:
    async with _world() as world:
        world.lane.count_in(world.clock.monotonic())
        world.lane.first_tokens.add(0.5, world.clock.monotonic())
        world.gate.divert(world.lane)
        (entry,) = world.gate.demand()
        assert entry.parked_requests == 1
        assert entry.first_token_p99_ms == pytest.approx(500, rel=0.26)
        assert entry.last_request_time.ToDatetime() == world.clock.now().replace(tzinfo=None)
        (again,) = world.gate.demand()
        assert again.parked_requests == 0
        await world.clock.advance(61.0)
        assert world.gate.demand() == []
        assert world.lane.absent_seconds is None


async def test_the_rate_of_ends_tells_when_to_come_again() -> None:
    async with _world(r0=1, r1=1) as world:
        drain = world.lane.drain
        assert drain.retry_after_seconds(3) == 5
        for number in range(4):
            world.ask(f"{number}", seconds=math.inf)
        await world.clock.advance(1.0)
        for _ in range(20):
            world.lane.ended_total += 2
            await world.clock.advance(1.0)
        assert drain.requests_per_second == pytest.approx(2.0, rel=0.1)
        assert drain.retry_after_seconds(3) == 2
        assert drain.retry_after_seconds(10_000) == 60
        for task in world.tasks.values():
            task.cancel()
        await world.clock.advance(60.0)
        # What ends while nobody waits says nothing.
        assert drain.requests_per_second == pytest.approx(2.0, rel=0.1)


async def test_a_limit_that_nothing_confirms_is_lifted() -> None:
    async with _world() as world:
        full = sample(running=1, waiting=1, own_in_flight=2)
        for each in world.endpoints * 3:
            world.gate.sample_taken(each, full)
        assert world.choose() is not None
        world.in_flight.update(r0=2, r1=2)
        world.ask("one")
        await world.clock.advance(4.0)
        assert world.order == []
        await world.clock.advance(2.0)
        assert world.order == ["one"]


def _view(deployment: str) -> View:
    record = records_pb2.DeploymentRecord(namespace="a", name=deployment)
    return build_view(version=1, endpoints=[], api_keys={}, deployments=[record])
