"""The latest statistics of every engine, with their age.

In come `EngineStats` records as the store brings them, out comes a sample for a replica if it is fresh.
The table changes in place and apart from the view: samples come every second from every engine, and a
picker wants the latest at the moment it picks. A stale or foreign sample is unknown, never zero.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from millrace.core.v1 import stats_pb2

from core.clock import Clock, from_timestamp

# Agents sample every second. Beyond this an engine's queue may have turned over completely, so that
# the number says nothing any more.
STALE_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class Sample:
    """One sample of an engine. None is unknown.

    Attributes:
        incarnation: Engine run that it comes from.
        taken_seconds: When it was taken, on the monotonic clock of this process.
        running_requests: In the running batch.
        waiting_requests: In the engine's queue.
        kv_usage_ratio: Share of the key/value cache in use, 0 to 1.
        own_in_flight: Most requests that this process had there at once since the sample before: the
            part of the engine's count that is ours.
        kv_cache_tokens: Size of the key/value cache, tokens.
        kv_block_tokens: Tokens of one block of it.
        device_utilization_ratio: Share of time that its devices are in use, 0 to 1, as their mean.
        adapters: LoRA adapters in the running batch; unknown for engines without.
        adapters_waiting: LoRA adapters that requests in the engine's queue wait for.
        adapters_max: How many one batch can hold.
    """

    incarnation: str
    taken_seconds: float
    running_requests: int | None
    waiting_requests: int | None
    kv_usage_ratio: float | None
    own_in_flight: int
    kv_cache_tokens: int | None = None
    kv_block_tokens: int | None = None
    device_utilization_ratio: float | None = None
    adapters: frozenset[str] | None = None
    adapters_waiting: frozenset[str] | None = None
    adapters_max: int | None = None

    @property
    def others_in_flight(self) -> int | None:
        """Requests that others have there; None when the engine did not say."""
        if self.running_requests is None and self.waiting_requests is None:
            return None
        total = (self.running_requests or 0) + (self.waiting_requests or 0)
        return max(0, total - self.own_in_flight)


class SampleTable:
    """Latest sample by replica; bounded by `retain`, which forgets replicas that left the store.

    Attributes:
        version: Grows with every change, so that readers know when what they made of samples is old.
    """

    def __init__(self, clock: Clock) -> None:
        self.version = 0
        self._clock = clock
        self._samples: dict[str, Sample] = {}

    def __len__(self) -> int:
        return len(self._samples)

    def record(self, stats: stats_pb2.EngineStats, *, own_in_flight: int) -> None:
        """Keeps a sample. Its age counts from when it was taken, as far as the clocks agree."""
        self.version += 1
        taken = from_timestamp(stats.sample_time)
        # A node whose clock runs ahead must not make samples younger than now.
        age = 0.0 if taken is None else max(0.0, (self._clock.now() - taken).total_seconds())
        adapters = stats.HasField("adapters")
        self._samples[stats.replica] = Sample(
            incarnation=stats.incarnation,
            taken_seconds=self._clock.monotonic() - age,
            running_requests=stats.running_requests if stats.HasField("running_requests") else None,
            waiting_requests=stats.waiting_requests if stats.HasField("waiting_requests") else None,
            kv_usage_ratio=stats.kv_usage_ratio if stats.HasField("kv_usage_ratio") else None,
            own_in_flight=own_in_flight,
            # A size of nothing is a size that was not told.
            kv_cache_tokens=stats.kv_cache_tokens or None,
            kv_block_tokens=stats.kv_block_tokens or None,
            device_utilization_ratio=(
                stats.device_utilization_ratio if stats.HasField("device_utilization_ratio") else None
            ),
            adapters=frozenset(stats.adapters.running) if adapters else None,
            adapters_waiting=frozenset(stats.adapters.waiting) if adapters else None,
            adapters_max=(stats.adapters.running_max or None) if adapters else None,
        )

    def fresh(self, replica: str, incarnation: str) -> Sample | None:
        """Returns the sample of an engine run; None when there is none younger than STALE_SECONDS."""
        sample = self._samples.get(replica)
        if sample is None or sample.incarnation != incarnation:
            return None
        return None if self.any_stale(sample.taken_seconds) else sample

    def any_stale(self, taken_seconds: float) -> bool:
        """Tells whether samples of which the oldest was taken then are stale."""
        return self._clock.monotonic() - taken_seconds > STALE_SECONDS

    def latest(self, replica: str, incarnation: str) -> Sample | None:
        """Returns the sample of an engine run whatever its age: for what never changes, such as sizes."""
        sample = self._samples.get(replica)
        return None if sample is None or sample.incarnation != incarnation else sample

    def age_seconds(self, replica: str) -> float | None:
        """Returns how old the latest sample of a replica is; None without one."""
        sample = self._samples.get(replica)
        return None if sample is None else self._clock.monotonic() - sample.taken_seconds

    def retain(self, replicas: Iterable[str]) -> None:
        """Forgets all other replicas."""
        kept = set(replicas)
        self.version += 1
        for replica in [each for each in self._samples if each not in kept]:
            del self._samples[replica]
