"""Reads the KV events of every engine of this machine that publishes some, and knows their mirrors.

In: the replicas and what their engines say of themselves. Out: a mirror for each replica and rank. A
replica is asked once it serves, and again after it could not be asked; its readers end with it.
Must not: touch the life of replicas.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import structlog

from core import errors
from core.clock import Clock
from core.tasks import cancel_and_wait
from nodeagent.kv_events.mirror import CacheMirror
from nodeagent.kv_events.reader import EventReader, read_sources
from nodeagent.replica import Replica

_log = structlog.get_logger(__name__)

# How soon a new engine is asked; its past is replayed, so nothing is lost meanwhile.
PERIOD_SECONDS = 0.5
# A reader that fails starts anew after this.
RETRY_SECONDS = 1.0

AskSources = Callable[[str], Awaitable[Any]]


@dataclass(slots=True)
class _Reading:
    """What is read of one run of an engine; no mirrors where it publishes nothing."""

    incarnation: str
    mirrors: dict[int, CacheMirror] = field(default_factory=dict)
    tasks: list["asyncio.Task[None]"] = field(default_factory=list)

    async def close(self) -> None:
        for mirror in self.mirrors.values():
            mirror.close()
        await cancel_and_wait(*self.tasks)


class KvEvents:
    """The mirrors of this node's engines."""

    def __init__(
        self, *, replicas: Callable[[], Iterable[Replica]], sources: AskSources, clock: Clock
    ) -> None:
        """Takes the replicas, and how an engine's URL is asked for its event sources.

        `sources` returns the JSON of `GET /kv_event_sources`, or None for an engine without that route;
        it raises Unavailable where the engine does not answer.
        """
        self._replicas = replicas
        self._sources = sources
        self._clock = clock
        self._readings: dict[str, _Reading] = {}

    def mirror(self, replica: str, rank: int) -> CacheMirror:
        """Returns a mirror.

        Raises:
            Unavailable: The engine has not been asked yet.
            FailedPrecondition: It publishes nothing, or has no such rank.
        """
        reading = self._readings.get(replica)
        if reading is None:
            raise errors.Unavailable(f"replica {replica} does not serve yet", metadata={"replica": replica})
        mirror = reading.mirrors.get(rank)
        if mirror is None:
            what = f"rank {rank}" if reading.mirrors else "replica"
            raise errors.FailedPrecondition(
                f"{what} of {replica} publishes no KV events: declare extra_args.kv_events true",
                metadata={"replica": replica},
            )
        return mirror

    async def run(self) -> None:
        """Keeps up with the replicas until cancelled."""
        try:
            while True:
                await self._keep_up()
                await self._clock.sleep(PERIOD_SECONDS)
        finally:
            for name in list(self._readings):
                await self._readings.pop(name).close()

    async def _keep_up(self) -> None:
        serving = {replica.name: replica for replica in self._replicas() if replica.serving}
        for name, reading in list(self._readings.items()):
            replica = serving.get(name)
            if replica is None or replica.observation.incarnation != reading.incarnation:
                del self._readings[name]
                await reading.close()
        for name, replica in serving.items():
            if name not in self._readings and not replica.external:
                opened = await self._open(replica)
                if opened is not None:
                    self._readings[name] = opened

    async def _open(self, replica: Replica) -> _Reading | None:
        """Asks an engine and begins to read; None where it could not be asked."""
        url, reading = replica.observation.url, _Reading(replica.observation.incarnation)
        try:
            content = await self._sources(url)
            sources = read_sources(content, url) if content is not None else {}
        except errors.Unavailable as error:
            _log.debug(
                "an engine does not say where its KV events are", replica=replica.name, error=str(error)
            )
            return None
        except ValueError as error:
            _log.error("KV events cannot be read", replica=replica.name, error=str(error))
            return reading
        for rank, source in sources.items():
            mirror = CacheMirror(reading.incarnation)
            reading.mirrors[rank] = mirror
            body = self._read(EventReader(source, mirror), replica.name)
            reading.tasks.append(asyncio.create_task(body, name=f"kv-events-{replica.name}-{rank}"))
        return reading

    async def _read(self, reader: EventReader, replica: str) -> None:
        while True:
            try:
                await reader.run()
            except Exception as error:  # noqa: BLE001 - one engine's events must not end the others'
                _log.error("KV events are lost for now", replica=replica, exc_info=error)
                reader.feed.give_up()
            await self._clock.sleep(RETRY_SECONDS)
