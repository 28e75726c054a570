"""Where requests wait: for a free engine while all are saturated, for any engine while there is none.

In come requests that found no room, ends of requests, samples and views; out come words to exactly as many
waiters as there is room for. A waiter that is told to go holds its place until it has been sent, and whoever
comes while someone waits joins the line, so that nobody overtakes. One a worker, on the event loop; `run`
refuses who has waited too long. It chooses no endpoint.
"""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from millrace.state.v1 import records_pb2

from core.clock import Clock
from router.admission.lane import DEMAND_SECONDS, Lane, demand
from router.admission.line import LineFull, WaitingLine
from router.admission.saturation import EndpointLimits
from router.admission.waiter import Waiter, Word
from router.view.samples import STALE_SECONDS, Sample
from router.view.view import Endpoint, View

# How much later than asked for a wait may end.
TICK_SECONDS = 0.25
_MEASURE_SECONDS = 1.0

Chosen = TypeVar("Chosen")
Usable = Callable[[str, str], Sequence[Endpoint]]


@dataclass(frozen=True, slots=True)
class Bounds:
    """Bounds of waiting, for the whole worker or where a deployment says nothing of its own.

    Attributes:
        requests_max: Requests in the line of one deployment.
        bytes_max: Bodies in all lines together.
        queue_seconds: Longest wait for a free engine.
        parking_seconds: Longest wait for any engine.
        start_seconds: How long a deployment takes to start where none was seen yet.
    """

    requests_max: int
    bytes_max: int
    queue_seconds: float
    parking_seconds: float
    start_seconds: float


class NotServed(Exception):
    """A request is not served now.

    Attributes:
        word: Why.
        waited_seconds: How long it waited.
        bound: Name of the bound that was reached: `requests`, `bytes` or `time`; empty for none.
    """

    def __init__(self, word: Word, waited_seconds: float, bound: str) -> None:
        super().__init__(word.value)
        self.word = word
        self.waited_seconds = waited_seconds
        self.bound = bound


class Gate:
    """Lanes of one worker.

    Attributes:
        saturation: Limits of the endpoints.
        bounds: Of waiting.
        parked: Set when a request begins to wait for a deployment that has no endpoint; whoever tells the
            cluster clears it.
        waiting_bytes: Bodies that wait.
    """

    def __init__(
        self, clock: Clock, bounds: Bounds, *, usable: Usable, in_flight: Callable[[str], int]
    ) -> None:
        """Takes how to find the endpoints that could be used now, and this worker's count at a replica."""
        self.saturation = EndpointLimits()
        self.bounds = bounds
        self.parked = asyncio.Event()
        self.waiting_bytes = 0
        self._clock = clock
        self._usable = usable
        self._in_flight = in_flight
        self._lanes: dict[tuple[str, str], Lane] = {}
        self._measured_seconds = clock.monotonic()

    def lane(self, namespace: str, deployment: str) -> Lane:
        """Returns the lane of a deployment that is in the view."""
        lane = self._lanes.get((namespace, deployment))
        if lane is None:
            lane = self._lanes[namespace, deployment] = Lane(namespace, deployment)
        return lane

    def waiting(self) -> tuple[int, int]:
        """Returns how many requests wait for a free engine and for any engine."""
        lanes = self._lanes.values()
        parked = sum(len(each.line) for each in lanes if each.absent_seconds is not None)
        return sum(len(each.line) for each in lanes) - parked, parked

    def demand(self) -> list[records_pb2.DeploymentDemand]:
        """Returns what the cluster should know of the requests here."""
        return demand(list(self._lanes.values()), self._clock)

    async def wait(
        self, lane: Lane, waiter: Waiter, choose: Callable[[], Chosen | None], *, requests_max: int
    ) -> Chosen:
        """Waits for room and chooses.

        Args:
            lane: Of the request's deployment.
            waiter: New.
            choose: Chooses an endpoint, or None where there is none with room; the request must be sent
                before the next await.
            requests_max: Most requests in this line.

        Returns:
            What was chosen.

        Raises:
            NotServed: There was no room in time, or none to wait in.
        """
        started = self._clock.monotonic()
        if self.waiting_bytes + waiter.body_bytes > self.bounds.bytes_max:
            raise NotServed(Word.PUSHED_OUT, 0.0, "bytes")
        lane.line.size_max = requests_max
        try:
            victim = lane.line.push(waiter)
        except LineFull:
            raise NotServed(Word.PUSHED_OUT, 0.0, "requests") from None
        if victim is not None:
            _tell(victim, Word.PUSHED_OUT)
        self.waiting_bytes += waiter.body_bytes
        try:
            self._note_absence(lane)
            self.pump(lane)
            while True:
                word = await self._hear(lane, waiter)
                if word is not Word.GO:
                    bound = {Word.LATE: "time", Word.PUSHED_OUT: "requests"}.get(word, "")
                    raise NotServed(word, self._clock.monotonic() - started, bound)
                chosen = choose()
                if chosen is not None:
                    return chosen
                # The room was another's before this one came to itself: the next that is freed is its own.
                waiter.word = asyncio.get_running_loop().create_future()
                lane.line.restore(waiter)
        finally:
            lane.line.remove(waiter)
            self.waiting_bytes -= waiter.body_bytes

    async def _hear(self, lane: Lane, waiter: Waiter) -> Word:
        """Waits for the word; a place that was granted to one who leaves goes to the next."""
        try:
            word = await waiter.word
        except asyncio.CancelledError:
            if waiter.word.done() and not waiter.word.cancelled() and waiter.word.result() is Word.GO:
                lane.granted -= 1
                self.pump(lane)
            raise
        if word is Word.GO:
            lane.granted -= 1
        return word

    def pump(self, lane: Lane) -> None:
        """Tells as many waiters of a lane to go as there is room for."""
        if not lane.line:
            return
        endpoints = self._usable(lane.namespace, lane.deployment)
        if not endpoints:
            return
        room = self.saturation.room(endpoints, self._in_flight)
        while room is None or room > lane.granted:
            waiter = lane.line.pop()
            if waiter is None:
                return
            if _tell(waiter, Word.GO):
                lane.granted += 1

    def sample_taken(self, endpoint: Endpoint, sample: Sample) -> None:
        """Learns from a sample of an endpoint, and lets in whom it has room for."""
        self.saturation.take(endpoint.replica, sample, own=self._in_flight(endpoint.replica))
        lane = self._lanes.get((endpoint.namespace, endpoint.deployment))
        if lane is not None:
            self.pump(lane)

    def view_changed(self, view: View) -> None:
        """Takes a new view: endpoints come and go, and deployments with all who wait for them."""
        self.saturation.retain(view.endpoints)
        for place, lane in list(self._lanes.items()):
            if view.deployment(*place) is None:
                _dismiss(lane.line, Word.GONE, lambda _: True)
                if lane.unused:
                    del self._lanes[place]
                continue
            self._note_absence(lane)
            self.pump(lane)

    async def run(self) -> None:
        """Ends waits that are over, lifts limits that nothing confirms, measures, for ever."""
        while True:
            await self._clock.sleep(TICK_SECONDS)
            self.tick()

    def divert(self, lane: Lane) -> None:
        """Notes that a request goes to the fall-back because the deployment has no endpoint."""
        lane.diverted += 1
        if lane.absent_seconds is None:
            lane.absent_seconds = self._clock.monotonic()
            self.parked.set()

    def tick(self) -> None:
        """Does what has become due."""
        now = self._clock.monotonic()
        measures = now - self._measured_seconds >= _MEASURE_SECONDS
        if measures:
            self._measured_seconds = now
            self.saturation.expire(now - STALE_SECONDS)
        for lane in self._lanes.values():
            if lane.line:
                _dismiss(lane.line, Word.LATE, lambda each: each.deadline_seconds <= now)
                self._note_absence(lane)
                self.pump(lane)
            elif lane.absent_seconds is not None and now - lane.last_request_seconds > DEMAND_SECONDS:
                # Nobody asks any more: what comes next begins a start of its own.
                lane.absent_seconds = None
            if measures:
                lane.drain.measure(lane.ended_total, now, waiting=len(lane.line) > 0)

    def _note_absence(self, lane: Lane) -> None:
        now = self._clock.monotonic()
        if self._usable(lane.namespace, lane.deployment):
            lane.present(now)
        elif lane.absent_seconds is None and lane.line:
            lane.absent_seconds = now
            self.parked.set()


def _dismiss(line: WaitingLine[Waiter], word: Word, leaves: Callable[[Waiter], bool]) -> None:
    for waiter in [each for each in line if leaves(each)]:
        line.remove(waiter)
        _tell(waiter, word)


def _tell(waiter: Waiter, word: Word) -> bool:
    """Tells a waiter; False where its client has just left, so that nobody hears it."""
    if waiter.word.done():
        return False
    waiter.word.set_result(word)
    return True
