"""Follows the KV events of every endpoint whose agent offers some.

In come views, out come copies of engines' caches by endpoint. One stream an endpoint, over one channel an
agent; a stream that breaks is opened again with a back-off and goes on where it stopped. What an endpoint
does not offer is asked for again rarely. It never delays a request: a copy that is not there is not known.
"""

import asyncio
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import grpc
import structlog
from millrace.agent.v1 import node_agent_service_pb2 as messages
from millrace.agent.v1 import node_agent_service_pb2_grpc

from core.backoff import Backoff, BackoffPolicy
from core.clock import Clock
from core.rpc import TlsFiles, call_metadata, open_channel
from core.tasks import cancel_and_wait
from router.prefix.exact.copy import CacheCopy, MalformedStreamError
from router.view.view import Endpoint

_log = structlog.get_logger(__name__)

# A stream takes a task and the copy of a cache; beyond this endpoints are picked by what was sent to them.
STREAMS_MAX = 256
# Agents are near and streams are cheap to open again.
_BACKOFF = BackoffPolicy(initial_seconds=0.2, maximum_seconds=5.0)
# An engine without KV events does not get them while it runs; its agent may learn of them late.
_NOT_OFFERED_SECONDS = 30.0
_NOT_OFFERED = (grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.UNIMPLEMENTED)
# Agents give a sign of life every 5 s.
_SILENCE_SECONDS = 15.0

# Replica, incarnation, agent.
_Key = tuple[str, str, str]


@dataclass(slots=True)
class _Stream:
    task: "asyncio.Task[None]"
    copy: CacheCopy


@dataclass(slots=True)
class _Channel:
    channel: grpc.aio.Channel
    users: set[_Key] = field(default_factory=set)


class CacheFollower:
    """Copies of caches by replica; `run` must be running."""

    def __init__(self, *, token: str, tls: TlsFiles | None, clock: Clock) -> None:
        """Takes the router token that agents know, and how to check and prove identities."""
        self._metadata = call_metadata(token)
        self._tls = tls
        self._clock = clock
        self._wanted: set[_Key] = set()
        self._changed = asyncio.Event()
        self._streams: dict[_Key, _Stream] = {}
        self._channels: dict[str, _Channel] = {}
        self._copies: dict[str, CacheCopy] = {}

    @property
    def copies(self) -> Mapping[str, CacheCopy]:
        """Copies by replica, of its present incarnation; whether they know anything they say themselves."""
        return self._copies

    def view_changed(self, endpoints: Iterable[Endpoint]) -> None:
        """Takes over which endpoints there are."""
        wanted = {
            (each.replica, each.incarnation, each.agent_target) for each in endpoints if each.agent_target
        }
        if len(wanted) > STREAMS_MAX:
            _log.warning("more endpoints than KV event streams", endpoints=len(wanted), streams=STREAMS_MAX)
            wanted = set(sorted(wanted)[:STREAMS_MAX])
        self._wanted = wanted
        self._changed.set()

    async def run(self) -> None:
        """Opens and ends streams as views come, until cancelled."""
        try:
            while True:
                await self._changed.wait()
                self._changed.clear()
                for key in [each for each in self._streams if each not in self._wanted]:
                    await self._end(key)
                for key in self._wanted - self._streams.keys():
                    self._begin(key)
        finally:
            for key in list(self._streams):
                await self._end(key)

    def _begin(self, key: _Key) -> None:
        replica, _, target = key
        channel = self._channels.get(target)
        if channel is None:
            channel = self._channels[target] = _Channel(open_channel(target, tls=self._tls))
        channel.users.add(key)
        copy = self._copies[replica] = CacheCopy()
        body = self._follow(key, channel.channel, copy)
        self._streams[key] = _Stream(asyncio.create_task(body, name=f"kv-events-{replica}"), copy)

    async def _end(self, key: _Key) -> None:
        replica, _, target = key
        stream = self._streams.pop(key)
        await cancel_and_wait(stream.task)
        if self._copies.get(replica) is stream.copy:
            del self._copies[replica]
        channel = self._channels[target]
        channel.users.discard(key)
        if not channel.users:
            del self._channels[target]
            await channel.channel.close()

    async def _follow(self, key: _Key, channel: grpc.aio.Channel, copy: CacheCopy) -> None:
        replica = key[0]
        stub = node_agent_service_pb2_grpc.NodeAgentServiceStub(channel)
        backoff = Backoff(_BACKOFF)
        while True:
            try:
                await self._read(stub, replica, copy, backoff)
                wait = backoff.failed()
            except grpc.aio.AioRpcError as error:
                offered = error.code() not in _NOT_OFFERED
                wait = backoff.failed() if offered else _NOT_OFFERED_SECONDS
                _log.debug("no KV events", replica=replica, code=error.code().name, reason=error.details())
            except (MalformedStreamError, TimeoutError) as error:
                wait = backoff.failed()
                _log.warning("KV events begin anew", replica=replica, reason=str(error) or "silence")
            await self._clock.sleep(wait)

    async def _read(
        self,
        stub: node_agent_service_pb2_grpc.NodeAgentServiceStub,
        replica: str,
        copy: CacheCopy,
        backoff: Backoff,
    ) -> None:
        copy.begin_stream()
        request = messages.StreamKvEventsRequest(replica=replica, epoch=copy.epoch, sequence=copy.sequence)
        # The stubs know the synchronous call only.
        call: Any = stub.StreamKvEvents(request, metadata=self._metadata)
        try:
            while True:
                async with asyncio.timeout(_SILENCE_SECONDS):
                    message = await call.read()
                if message is grpc.aio.EOF:
                    return
                copy.apply(message, self._clock.monotonic())
                backoff.succeeded()
        finally:
            call.cancel()
