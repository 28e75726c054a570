"""How many requests of this worker an engine can take now: learned from samples, checked by one comparison.

In come samples with this worker's own count at that moment, out comes a limit for each engine that is known
to have one. An engine is saturated when this worker has as many requests there as the limit says. Two things
limit:

    batch   the engine keeps requests waiting while its batch stays at the same number R of running ones,
            three samples in a row, and never ran more: R is all that it runs. Two would be a coincidence too
            often where prompts wait for the engine's computing and not for a place in its batch.
            limit = R + backlog - others
    memory  the engine keeps requests waiting and its KV cache is full: it cannot take more than it has.
            limit = own - waiting * own / (own + others) + backlog
            With every later sample in which nothing waits, or there is memory and what waits waits for
            computing, it grows by a quarter and one, until it is so far above what is sent that it limits
            nothing: lifted at once, it would let the whole line in.

`own` is this worker's count, `others` what the engine reports beyond it, `backlog` a few requests that may
wait inside the engine, so that it does not run dry until the next one is sent. The smaller limit holds, and
never less than one: the end of a request of ours is what wakes who waits, so there must be one. What is
missing or stale limits nothing (law 1). Pure but for the clock that it is told.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from router.view.samples import Sample
from router.view.view import Endpoint

# vLLM counts a block as used when a running request holds it; it preempts from here on.
KV_FULL_RATIO = 0.95
# Growth of a limit by memory with every sample in which nothing waits.
GROWTH_RATIO = 1.25
# Share of the batch that may wait inside the engine: several requests end in one step of a large batch.
BACKLOG_RATIO = 1 / 16
# Samples in a row that a batch stays the same while others wait.
BATCH_SAMPLES = 3


@dataclass(slots=True)
class _Learned:
    """What is known of one engine run.

    Attributes:
        incarnation: Engine run.
        running_max: Most requests seen running.
        held: Running requests of the last sample if others waited then; None otherwise.
        held_samples: Samples in a row with that number.
        batch: Requests that the engine runs at once; None while not known.
        memory: Requests of ours that its memory can hold; None while not known.
        taken_seconds: When the last sample was taken.
    """

    incarnation: str
    running_max: int = 0
    held: int | None = None
    held_samples: int = 0
    batch: int | None = None
    memory: int | None = None
    taken_seconds: float = 0.0


class EndpointLimits:
    """Limits by replica.

    Attributes:
        limits: Most requests that this worker may have at a replica; a replica that is not here has no limit.
            Read on the hot path.
    """

    def __init__(self) -> None:
        self.limits: dict[str, int] = {}
        self._learned: dict[str, _Learned] = {}

    def take(self, replica: str, sample: Sample, *, own: int) -> None:
        """Learns from a sample.

        Args:
            replica: Whose it is.
            sample: As it came.
            own: Requests that this worker has there now.
        """
        learned = self._learned.get(replica)
        if learned is None or learned.incarnation != sample.incarnation:
            learned = self._learned[replica] = _Learned(sample.incarnation)
        learned.taken_seconds = sample.taken_seconds
        _learn_batch(learned, sample)
        limit = _limit(learned, sample, own)
        if limit is None:
            self.limits.pop(replica, None)
        else:
            self.limits[replica] = limit

    def free(self, endpoints: Sequence[Endpoint], in_flight: Callable[[str], int]) -> Sequence[Endpoint]:
        """Returns the endpoints that can take one more request, in the same order; all without limits."""
        limits = self.limits
        if not limits:
            return endpoints
        return [
            each
            for each in endpoints
            if (limit := limits.get(each.replica)) is None or in_flight(each.replica) < limit
        ]

    def room(self, endpoints: Iterable[Endpoint], in_flight: Callable[[str], int]) -> int | None:
        """Returns how many more requests endpoints can take together; None for any number."""
        total = 0
        for each in endpoints:
            limit = self.limits.get(each.replica)
            if limit is None:
                return None
            total += max(0, limit - in_flight(each.replica))
        return total

    def expire(self, older_than_seconds: float) -> bool:
        """Lifts the limits whose sample was taken before a moment; tells whether there was one."""
        stale = [
            replica for replica in self.limits if self._learned[replica].taken_seconds < older_than_seconds
        ]
        for replica in stale:
            del self.limits[replica]
        return bool(stale)

    def retain(self, endpoints: Iterable[Endpoint]) -> None:
        """Forgets all other replicas, and earlier incarnations of these."""
        if not self._learned:
            return
        kept = {each.identity for each in endpoints}
        self._learned = {
            replica: learned
            for replica, learned in self._learned.items()
            if (replica, learned.incarnation) in kept
        }
        self.limits = {replica: limit for replica, limit in self.limits.items() if replica in self._learned}


def _learn_batch(learned: _Learned, sample: Sample) -> None:
    running, waiting = sample.running_requests, sample.waiting_requests
    if running is None or waiting is None:
        learned.held = None
        return
    if running > learned.running_max:
        learned.running_max = running
        learned.batch = None
    # A full KV cache holds the batch back, too, and says nothing of the batch.
    held_back = waiting > 0 and running > 0 and not _kv_full(sample)
    learned.held_samples = learned.held_samples + 1 if held_back and learned.held == running else 1
    learned.held = running if held_back else None
    if held_back and learned.held_samples >= BATCH_SAMPLES and running == learned.running_max:
        learned.batch = running


def _limit(learned: _Learned, sample: Sample, own: int) -> int | None:
    others = sample.others_in_flight
    if others is None:
        return None
    _learn_memory(learned, sample, own, others)
    found = [] if learned.memory is None else [learned.memory]
    if learned.batch is not None:
        found.append(learned.batch + backlog(learned.batch) - others)
    return max(1, min(found)) if found else None


def _learn_memory(learned: _Learned, sample: Sample, own: int, others: int) -> None:
    at_once = max(sample.own_in_flight, own)
    waiting = sample.waiting_requests or 0
    if waiting and _kv_full(sample):
        ours = waiting * at_once / (at_once + others) if at_once else 0.0
        learned.memory = max(1, at_once - round(ours) + backlog(at_once))
    elif learned.memory is not None:
        learned.memory = round(learned.memory * GROWTH_RATIO) + 1
        if learned.memory > 2 * at_once + 8:
            learned.memory = None


def backlog(batch: int) -> int:
    """Returns how many requests may wait inside an engine whose batch has a size."""
    return max(1, round(batch * BACKLOG_RATIO))


def _kv_full(sample: Sample) -> bool:
    return sample.kv_usage_ratio is not None and sample.kv_usage_ratio >= KV_FULL_RATIO
