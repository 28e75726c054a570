"""Reads the KV events of one engine, or of one of its ranks, over ZMQ.

In: where an engine publishes. Out: a feed that is kept in order, for as long as `run` runs. Everything
that goes wrong on the way (a lost connection, a gap, a message that cannot be read, a replay that is not
answered) ends in a mirror that knows less, never in one that is wrong.
Must not: decide which engines are read.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import structlog
import zmq
import zmq.asyncio
from zmq.utils.monitor import parse_monitor_message

from nodeagent.kv_events.codec import Batch, MalformedEventsError, decode_batch
from nodeagent.kv_events.feed import Feed, Verdict
from nodeagent.kv_events.mirror import CacheMirror

_log = structlog.get_logger(__name__)

# vLLM answers replays between its batches, at most 0.1 s apart; ten thousand batches take a second.
REPLAY_TIMEOUT_MS = 5_000
# As vLLM's own limit: what a reader may lag before messages are dropped and a gap is seen.
HIGH_WATER_MARK = 100_000
# How long the replay at the start waits for the subscription.
CONNECT_TIMEOUT_MS = 1_000
# An engine that says nothing for so long is asked whether it is still the same and nothing was missed.
IDLE_CHECK_MS = 10_000
_CONNECTED = zmq.EVENT_HANDSHAKE_SUCCEEDED
_END = b"\xff" * 8


@dataclass(frozen=True, slots=True)
class EventSource:
    """Where a rank publishes, as its engine says in `GET /kv_event_sources`.

    Attributes:
        endpoint: Where to connect the subscriber.
        replay_endpoint: Where to ask for the past, None where it is not kept.
        topic: Prefix of the topics to hear.
    """

    endpoint: str
    replay_endpoint: str | None
    topic: str


def read_sources(content: Any, engine_url: str) -> dict[int, EventSource]:
    """Reads the answer of `GET /kv_event_sources`: rank to source, empty where nothing is published.

    Raises:
        ValueError: The answer is not of the known form.
    """
    sources: dict[int, EventSource] = {}
    if not isinstance(content, Mapping):
        raise ValueError("the answer is no JSON object")  # noqa: TRY004 - what an engine says, not a caller
    for rank, each in content.items():
        if not isinstance(each, Mapping) or each.get("enable_kv_cache_events") is not True:
            continue
        endpoint = each.get("endpoint")
        if each.get("publisher") != "zmq" or not isinstance(endpoint, str):
            raise ValueError(f"rank {rank} publishes in a way that is not known: {each.get('publisher')}")
        replay = each.get("replay_endpoint")
        sources[int(rank)] = EventSource(
            _reachable(endpoint, engine_url),
            _reachable(replay, engine_url) if isinstance(replay, str) else None,
            str(each.get("topic") or ""),
        )
    return sources


def _reachable(endpoint: str, engine_url: str) -> str:
    """Puts the engine's host in the place of a wildcard."""
    host = urlsplit(engine_url).hostname or "127.0.0.1"
    host = f"[{host}]" if ":" in host else host
    return endpoint.replace("*", host).replace("[::]", host)


class EventReader:
    """Keeps one mirror in step with one publisher."""

    def __init__(self, source: EventSource, mirror: CacheMirror) -> None:
        """Takes where to read and what to fill; `run` does the rest."""
        self._source = source
        self.feed = Feed(mirror, replayable=source.replay_endpoint is not None)

    async def run(self) -> None:
        """Reads until cancelled."""
        context = zmq.asyncio.Context()
        try:
            with context.socket(zmq.SUB) as subscriber:
                subscriber.set_hwm(HIGH_WATER_MARK)
                subscriber.setsockopt(zmq.LINGER, 0)
                subscriber.setsockopt(zmq.IPV6, 1)
                monitor = subscriber.get_monitor_socket(_CONNECTED | zmq.EVENT_DISCONNECTED)
                try:
                    subscriber.subscribe(self._source.topic.encode())
                    subscriber.connect(self._source.endpoint)
                    # What is published before the subscription arrives is heard by replay only.
                    await monitor.poll(CONNECT_TIMEOUT_MS)
                    await self._resync(context)
                    while True:
                        if not await subscriber.poll(IDLE_CHECK_MS):
                            await self._check_idle(context)
                            continue
                        frames = await subscriber.recv_multipart()
                        while await monitor.poll(0):
                            event = parse_monitor_message(await monitor.recv_multipart())
                            if event["event"] == zmq.EVENT_DISCONNECTED:
                                self.feed.suspect()
                        await self._take(context, frames)
                finally:
                    subscriber.disable_monitor()
        finally:
            context.destroy(linger=0)

    async def _take(self, context: zmq.asyncio.Context, frames: list[bytes]) -> None:
        batch = self._decode(frames)
        if batch is None:
            return
        if self.feed.offer(batch) is not Verdict.RESYNC:
            return
        _log.info("KV events are out of step", endpoint=self._source.endpoint, sequence=batch.sequence)
        await self._resync(context)
        if self.feed.offer(batch) is Verdict.RESYNC:
            self.feed.force(batch)

    async def _check_idle(self, context: zmq.asyncio.Context) -> None:
        if self._source.replay_endpoint is not None:
            await self._resync(context)

    async def _resync(self, context: zmq.asyncio.Context) -> None:
        """Brings the feed up to date by replay; without one it goes on from what comes next."""
        if self._source.replay_endpoint is None:
            self.feed.give_up()
            return
        while True:
            # A socket of its own for each request: late answers to an earlier one cannot mix in.
            with context.socket(zmq.DEALER) as dealer:
                dealer.set_hwm(HIGH_WATER_MARK)
                dealer.setsockopt(zmq.LINGER, 0)
                dealer.setsockopt(zmq.IPV6, 1)
                dealer.connect(self._source.replay_endpoint)
                start = self.feed.begin_replay()
                await dealer.send_multipart([b"", start.to_bytes(8, "big")])
                if not await self._receive_replay(dealer):
                    _log.warning("a replay of KV events is not answered", endpoint=self._source.endpoint)
                    self.feed.give_up()
                    return
            if not self.feed.end_replay():
                return

    async def _receive_replay(self, dealer: "zmq.asyncio.Socket") -> bool:
        """Takes a replay's batches; False where its end does not come."""
        while await dealer.poll(REPLAY_TIMEOUT_MS):
            # An empty frame comes first; older engines leave the topic out.
            *_, sequence, payload = await dealer.recv_multipart()
            if sequence == _END:
                return True
            batch = self._decode([b"", sequence, payload])
            if batch is None:
                return False
            self.feed.replay(batch)
        return False

    def _decode(self, frames: list[bytes]) -> Batch | None:
        """Reads a message; one that cannot be read costs everything that is known."""
        try:
            if len(frames) != 3:
                raise MalformedEventsError(f"a message of {len(frames)} frames")
            return decode_batch(frames[1], frames[2])
        except MalformedEventsError as error:
            _log.error("KV events cannot be read", endpoint=self._source.endpoint, error=str(error))
            self.feed.give_up()
            return None
