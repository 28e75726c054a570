"""A prefix of the store, kept in memory and decoded, which knows its age.

In come the batches of a watch, after one listing; out come `items` that are safe to read at any time,
and word of what changed. While the store is away the last content stands and `age_seconds` grows: the
reader decides how old is too old. It writes nothing, and one bad value or subscriber does not stop it.
"""

import asyncio
import math
from collections.abc import Callable, Mapping
from contextlib import aclosing
from types import MappingProxyType
from typing import Generic, TypeVar

import structlog

from core.backoff import Backoff, BackoffPolicy
from core.clock import Clock
from core.store.types import (
    Compacted,
    KeyValue,
    Page,
    Store,
    StoreError,
    StoreUnavailable,
    WatchBatch,
)
from core.store.waiting import is_set_within

_log = structlog.get_logger(__name__)

T = TypeVar("T")

# Short enough that a store which is back is noticed soon; jitter keeps a thousand routers apart.
_BACKOFF = BackoffPolicy(initial_seconds=0.1, maximum_seconds=2.0)

Callback = Callable[[frozenset[str]], None]


class Mirror(Generic[T]):
    """Keeps a prefix in memory by list-then-watch.

    Attributes:
        name: For logs and errors.
        failed_callbacks: How often a subscriber raised.
    """

    def __init__(
        self,
        store: Store,
        prefix: str,
        decode: Callable[[bytes], T],
        *,
        name: str,
        clock: Clock,
    ) -> None:
        self.name = name
        self.failed_callbacks = 0
        self._store = store
        self._prefix = prefix
        self._decode = decode
        self._clock = clock
        self._values: dict[str, T] = {}
        self._revisions: dict[str, int] = {}
        self._undecodable: dict[str, int] = {}
        self._snapshot: Mapping[str, T] | None = None
        self._revision = 0
        self._must_list = True
        self._synced = asyncio.Event()
        self._advanced = asyncio.Event()
        self._heard: float | None = None
        self._last_error = ""
        self._callbacks: list[Callback] = []
        self._backoff = Backoff(_BACKOFF)
        self._listing_lock = asyncio.Lock()
        self._listing: Page | None = None
        self._listings_begun = 0
        self._listed = 0

    @property
    def items(self) -> Mapping[str, T]:
        """Full key to value. Never changes under the reader: a later batch makes a new mapping."""
        if self._snapshot is None:
            self._snapshot = MappingProxyType(dict(self._values))
        return self._snapshot

    @property
    def undecodable(self) -> frozenset[str]:
        """Keys whose present value cannot be decoded and which `items` therefore leaves out."""
        return frozenset(self._undecodable)

    @property
    def revision(self) -> int:
        """Revision up to which no change of the prefix is missing; 0 before the first listing."""
        return self._revision

    @property
    def synced(self) -> bool:
        """True once the prefix has been listed."""
        return self._synced.is_set()

    def get(self, key: str) -> T | None:
        """Returns a key's value, or None."""
        return self._values.get(key)

    def revision_of(self, key: str) -> int:
        """Returns the mod_revision that guards the next write of a key; 0 where it does not exist."""
        return self._revisions.get(key, 0)

    def age_seconds(self) -> float:
        """Returns the time since the store's last word; infinite before the first."""
        return math.inf if self._heard is None else self._clock.monotonic() - self._heard

    def subscribe(self, callback: Callback) -> Callable[[], None]:
        """Has a function called with the changed keys after each batch that changed some.

        It is called on the event loop and must not block. If it raises, that is logged and counted in
        `failed_callbacks`, and the mirror goes on: a subscriber that trips over one odd record must
        not blind the whole process. Subscribers are level-triggered: the next call covers the miss.

        Returns:
            A function that ends the subscription.
        """
        self._callbacks.append(callback)

        def unsubscribe() -> None:
            if callback in self._callbacks:
                self._callbacks.remove(callback)

        return unsubscribe

    async def wait_synced(self, timeout_seconds: float) -> None:
        """Waits for the first listing.

        Raises:
            StoreUnavailable: It did not come in time.
        """
        if not await is_set_within(self._clock, timeout_seconds, self._synced):
            raise StoreUnavailable(
                f"{self.name} could not be read within {timeout_seconds:g} s"
                + (f": {self._last_error}" if self._last_error else "")
            )

    async def wait_for_revision(self, revision: int, timeout_seconds: float) -> None:
        """Waits until every change of the prefix up to a revision is in `items`.

        Meant for revisions of writes to this prefix: word of others comes with idle progress only.

        Raises:
            StoreUnavailable: It did not come in time.
        """
        deadline = self._clock.monotonic() + timeout_seconds
        while self._revision < revision:
            remaining = deadline - self._clock.monotonic()
            if remaining <= 0:
                raise StoreUnavailable(
                    f"{self.name} stands at revision {self._revision} and did not reach {revision} "
                    f"within {timeout_seconds:g} s"
                )
            await is_set_within(self._clock, remaining, self._advanced)

    async def wait_current(self, timeout_seconds: float) -> None:
        """Waits until `items` is at least as new as the store was when this was called.

        A watch whose connection has silently died leaves the mirror behind for seconds, and nothing in it
        says so. Whoever acts on what is *absent* asks first. Callers at one time share one listing of keys.

        Raises:
            StoreUnavailable: The store did not answer, or the mirror did not catch up in time.
        """
        deadline = self._clock.monotonic() + timeout_seconds
        page = await self._listing_begun_after_now()
        while not self._covers(page):
            remaining = deadline - self._clock.monotonic()
            if remaining <= 0:
                raise StoreUnavailable(
                    f"{self.name} lags behind the store and did not catch up within {timeout_seconds:g} s"
                )
            await is_set_within(self._clock, remaining, self._advanced)

    async def _listing_begun_after_now(self) -> Page:
        # A listing that is under way may have been read before now; the next one serves all who wait.
        wanted = self._listings_begun + 1
        async with self._listing_lock:
            if self._listed < wanted or self._listing is None:
                self._listings_begun += 1
                number = self._listings_begun
                self._listing = await self._store.list(self._prefix, keys_only=True)
                self._listed = number
            return self._listing

    def _covers(self, page: Page) -> bool:
        """Tells whether nothing that a listing shows, or shows as gone, is missing here."""
        if self._synced.is_set() and self._revision >= page.revision:
            return True
        # The revision of a quiet prefix lags behind: then the keys themselves decide.
        listed = {item.key: item.mod_revision for item in page.items}
        return all(self._revisions.get(key, 0) >= revision for key, revision in listed.items()) and all(
            key in listed for key in self._revisions
        )

    async def run(self) -> None:
        """Lists, then watches, for ever. The owner runs it as a named task."""
        while True:
            try:
                if self._must_list:
                    await self._list()
                await self._follow()
            except Compacted as error:
                _log.info("mirror lists again", mirror=self.name, error=str(error))
                self._must_list = True
            except StoreError as error:
                # Any refusal is treated as absence: the last content still serves, its age tells.
                log = _log.warning if self._backoff.failures == 0 else _log.debug
                log("mirror lost the store", mirror=self.name, error=str(error))
                self._last_error = str(error)
            await self._clock.sleep(self._backoff.failed())

    async def _list(self) -> None:
        page = await self._store.list(self._prefix)
        present = {item.key: item for item in page.items}
        changed = {key for key in self._revisions if key not in present}
        changed |= {key for key, item in present.items() if self._revisions.get(key) != item.mod_revision}
        for key in changed:
            self._set(key, present.get(key))
        self._must_list = False
        self._advance(page.revision, frozenset(changed))
        self._synced.set()

    async def _follow(self) -> None:
        watch = self._store.watch(self._prefix, start_revision=self._revision + 1)
        async with aclosing(watch) as batches:
            async for batch in batches:
                self._backoff.succeeded()
                self._apply(batch)

    def _apply(self, batch: WatchBatch) -> None:
        for event in batch.events:
            self._set(event.key, event.value)
        self._advance(batch.revision, frozenset(event.key for event in batch.events))

    def _set(self, key: str, item: KeyValue | None) -> None:
        self._snapshot = None
        self._undecodable.pop(key, None)
        if item is None:
            self._values.pop(key, None)
            self._revisions.pop(key, None)
            return
        self._revisions[key] = item.mod_revision
        try:
            self._values[key] = self._decode(item.value)
        except Exception as error:  # noqa: BLE001 - the decoder is the owner's; one bad value must not stop the rest
            # An older value under the new revision would be a lie.
            self._values.pop(key, None)
            self._undecodable[key] = item.mod_revision
            _log.error(
                "value cannot be decoded, left out",
                mirror=self.name,
                key=key,
                revision=item.mod_revision,
                error=repr(error),
            )

    def _advance(self, revision: int, changed: frozenset[str]) -> None:
        self._heard = self._clock.monotonic()
        self._revision = max(self._revision, revision)
        self._advanced.set()
        self._advanced = asyncio.Event()
        if not changed:
            return
        for callback in tuple(self._callbacks):
            try:
                callback(changed)
            except Exception:  # noqa: BLE001 - the subscriber's code is its own; see subscribe
                self.failed_callbacks += 1
                _log.exception("subscriber failed", mirror=self.name, changed=len(changed))
