"""One watch: an etcd stream that is opened again, from where it stood, whenever it breaks.

In come a prefix and the first revision to hear of, out come batches of changes in order. A stream that
falls silent is given up after a bound and resumed at another member; only what etcd itself declares
lost (compaction) or a long silence reaches the caller. Each watch has a stream of its own, so that a
slow consumer holds up nobody else.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from typing import Any

import grpc
import structlog
from grpc.aio import AioRpcError, UsageError

from core.backoff import Backoff, BackoffPolicy
from core.store import etcd_wire as wire
from core.store.etcd_channels import Channels, token_metadata
from core.store.types import Compacted, StoreError, StoreUnavailable, WatchBatch

_log = structlog.get_logger(__name__)

# The contract promises a word every 10 s; etcd's own progress comes every 10 min.
_PROGRESS_SECONDS = 5.0
# Two unanswered requests for progress: the peer is gone, whatever its connection says.
_SILENCE_SECONDS = 10.0
# The contract's bound: then the caller is told.
_GIVE_UP_SECONDS = 30.0
# One attempt to find a member, so that a lost one does not use up the whole bound.
_CONNECT_SECONDS = 5.0
_BACKOFF = BackoffPolicy(initial_seconds=0.05, maximum_seconds=1.0)


class _StreamLostError(Exception):
    """The stream broke in a way that opening it again may mend."""


@dataclass(slots=True)
class EtcdWatch:
    """State of one watch between its streams."""

    channels: Channels
    prefix: str
    next_revision: int
    _heard: float = 0.0
    _refused: str = ""
    _backoff: Backoff = field(default_factory=lambda: Backoff(_BACKOFF))

    async def batches(self) -> AsyncGenerator[WatchBatch, None]:
        """Yields batches until closed.

        Raises:
            Compacted: The next revision is gone.
            StoreError: etcd refuses the watch, for lack of permission for example.
            StoreUnavailable: Nothing was heard for 30 s, or the store was closed.
        """
        loop = asyncio.get_running_loop()
        self._heard = loop.time()
        while True:
            try:
                async with aclosing(self._stream()) as stream:
                    async for batch in stream:
                        self.next_revision = max(self.next_revision, batch.revision + 1)
                        yield batch
                        # A consumer that took its time must not count as silence of etcd.
                        self._heard = loop.time()
            except _StreamLostError as error:
                silent_seconds = loop.time() - self._heard
                if self.channels.closed:
                    raise StoreUnavailable(f"the store is closed (watching {self.prefix})") from error
                if silent_seconds >= _GIVE_UP_SECONDS:
                    raise StoreUnavailable(
                        f"nothing was heard from etcd for {silent_seconds:.0f} s while watching "
                        f"{self.prefix}: {error}"
                    ) from error
                # Once an outage: the attempts that follow say nothing new.
                log = _log.info if self._backoff.failures == 0 else _log.debug
                log(
                    "watch lost, resuming",
                    prefix=self.prefix,
                    from_revision=self.next_revision,
                    error=str(error),
                )
                await asyncio.sleep(self._backoff.failed())

    async def _stream(self) -> AsyncGenerator[WatchBatch, None]:
        """Yields the batches of one stream until it breaks."""
        loop = asyncio.get_running_loop()
        doing = f"watching {self.prefix}"
        try:
            member = await self.channels.connected(loop.time() + _CONNECT_SECONDS, doing=doing)
            token = await self.channels.token(member, loop.time() + _CONNECT_SECONDS)
        except StoreUnavailable as error:
            raise _StreamLostError(str(error)) from error
        metadata = (*token_metadata(token), ("hasleader", "true"))
        ended = asyncio.Event()
        requests = _requests(self.prefix, self.next_revision, ended)
        call = member.watch.Watch(requests, metadata=metadata)
        fragments: list[Any] = []
        try:
            while True:
                response = await self._read(call)
                if response.canceled:
                    self._raise_cancelled(response, token)
                self._heard = loop.time()
                fragments.extend(response.events)
                if response.fragment:
                    continue
                batch = self._batch(response, fragments)
                fragments = []
                if not response.created:
                    self._refused = ""
                    self._backoff.succeeded()
                yield batch
        except AioRpcError as error:
            if wire.is_token_refused(wire.details_of(error)):
                self.channels.forget_token(token)
            self.channels.rotate(member)
            text = f"{error.code().name}: {wire.details_of(error)}"
            raise _StreamLostError(text) from error
        except TimeoutError as error:
            self.channels.rotate(member)
            raise _StreamLostError(f"{member.endpoint} has been silent") from error
        finally:
            # grpc ends its reader of our requests only for calls that were not over already.
            ended.set()
            call.cancel()

    async def _read(self, call: Any) -> Any:
        try:
            async with asyncio.timeout(_SILENCE_SECONDS):
                response = await call.read()
        except asyncio.CancelledError:
            self.channels.raise_if_closed_under()
            raise
        except UsageError as error:
            raise _StreamLostError("the channel is closed") from error
        if response is grpc.aio.EOF:
            # Raises the stream's own error, if it ended with one.
            code, details = await call.code(), await call.details()
            raise _StreamLostError(f"the stream ended: {code.name}: {details}")
        return response

    def _batch(self, response: Any, events: list[Any]) -> WatchBatch:
        if events:
            # The header may be ahead of a catch-up that comes in several responses.
            return WatchBatch(tuple(wire.watch_event(each) for each in events), events[-1].kv.mod_revision)
        if response.created or response.watch_id < 0:
            # Up to etcd 3.5.7 an answer to a request for progress may overtake changes, so that its
            # revision proves nothing; the stream's own progress, sent by the watcher, does.
            return WatchBatch((), self.next_revision - 1)
        return WatchBatch((), max(self.next_revision - 1, response.header.revision))

    def _raise_cancelled(self, response: Any, token: str) -> None:
        if response.compact_revision:
            raise Compacted(self.next_revision, response.compact_revision)
        reason = str(response.cancel_reason)
        # Before etcd 3.5.5 a forgotten token reads as a lack of permission: one new token decides.
        if wire.is_token_refused(reason) or (token and self._refused != reason):
            self._refused = reason
            self.channels.forget_token(token)
            raise _StreamLostError(reason)
        if "no leader" in reason:
            raise _StreamLostError(reason)
        raise StoreError(f"etcd refused while watching {self.prefix}: {reason}")


async def _requests(prefix: str, start_revision: int, ended: asyncio.Event) -> AsyncIterator[Any]:
    """What goes up the stream: the watcher, then a request for a sign of life every few seconds."""
    yield wire.watch_request(prefix, start_revision)
    while True:
        with suppress(TimeoutError):
            async with asyncio.timeout(_PROGRESS_SECONDS):
                await ended.wait()
        if ended.is_set():
            return
        yield wire.progress_request()
