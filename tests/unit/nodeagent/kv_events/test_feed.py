"""The mirror after any history: losses, gaps, replays with holes, restarts, and readers that lag."""

from collections import deque
from dataclasses import dataclass, field
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from nodeagent.kv_events.codec import Batch, Cleared, Event, Removed, Stored
from nodeagent.kv_events.feed import Feed, Verdict
from nodeagent.kv_events.mirror import CacheMirror, HashScheme


def stored(*hashes: int, **fields: Any) -> Stored:
    values: dict[str, Any] = {
        "parent": None,
        "token_ids": [],
        "block_tokens": 16,
        "plain": False,
        "group": 0,
        "whole_prefix": True,
        **fields,
    }
    return Stored(hashes, **values)


@dataclass
class Engine:
    """A cache that tells what it does, and repeats the last few batches; every run counts from 0."""

    kept: int
    now: float = 0.0
    sequence: int = 0
    blocks: set[int] = field(default_factory=set)
    buffer: deque[Batch] = field(default_factory=deque)

    def step(self, actions: list[tuple[str, int]]) -> Batch:
        events: list[Event] = []
        for action, number in actions:
            if action == "store":
                self.blocks.add(number)
                events.append(stored(number))
            elif action == "remove" and number in self.blocks:
                self.blocks.remove(number)
                events.append(Removed((number,), 0))
            elif action == "clear" and number == 0:
                self.blocks.clear()
                events.append(Cleared())
        self.now += 1
        batch = Batch(self.sequence, self.now, tuple(events))
        self.sequence += 1
        self.buffer.append(batch)
        while len(self.buffer) > self.kept:
            self.buffer.popleft()
        return batch

    def restart(self) -> None:
        self.sequence = 0
        self.blocks = set()
        self.buffer.clear()


@dataclass
class Copy:
    """A router's copy, which reads now and then."""

    mirror: CacheMirror
    epoch: str = ""
    sequence: int = 0
    blocks: set[int] = field(default_factory=set)

    def read(self) -> None:
        changes = self.mirror.changes_after(self.epoch, self.sequence)
        if changes is None:
            self.blocks = set(self.mirror.present())
        for change in changes or ():
            assert not set(change.removed) & set(change.stored)
            if change.cleared:
                self.blocks.clear()
            assert self.blocks >= set(change.removed)
            self.blocks = (self.blocks - set(change.removed)) | set(change.stored)
        self.epoch, self.sequence = self.mirror.epoch, self.mirror.sequence
        assert self.blocks == self.mirror.present()


ACTIONS = st.lists(
    st.tuples(st.sampled_from(["store", "store", "store", "remove", "clear"]), st.integers(0, 9)), max_size=6
)
HISTORY = st.lists(
    st.one_of(
        st.tuples(st.just("step"), ACTIONS, st.booleans()),
        st.just(("restart",)),
        st.just(("idle",)),
        st.just(("read",)),
    ),
    max_size=40,
)


@settings(max_examples=400, deadline=None)
@given(HISTORY, st.integers(1, 6), st.lists(st.integers(1, 5), max_size=12), st.booleans())
def test_the_mirror_is_the_engines_cache_or_less(  # noqa: C901 - a history is told in one piece
    history: list[Any], kept: int, holes: list[int], replayable: bool
) -> None:
    engine = Engine(kept)
    mirror = CacheMirror(changed_hashes_max=8)
    feed = Feed(mirror, replayable=replayable)
    copy = Copy(mirror)
    tail_lost = False

    def resync() -> None:
        nonlocal tail_lost
        if not replayable:
            feed.give_up()
            return
        while True:
            start = feed.begin_replay()
            # A replay loses messages when the engine's queue is full, so never its first one.
            hole = holes.pop() if holes else None
            batches = [each for each in engine.buffer if each.sequence >= start]
            # Nothing tells that the last message of a replay is missing before the next live batch comes.
            tail_lost = bool(batches) and hole == len(batches) - 1
            for number, batch in enumerate(batches):
                if number != hole:
                    feed.replay(batch)
            if not feed.end_replay():
                return

    def check() -> None:
        if tail_lost:
            # The mirror shows an earlier moment, as it does while a live batch is on its way.
            return
        assert mirror.present() <= engine.blocks
        if mirror.complete:
            assert mirror.present() == engine.blocks

    resync()
    for action, *rest in history:
        if action == "restart":
            engine.restart()
            # A process cannot end without its connections ending.
            feed.suspect()
        elif action == "idle" and replayable:
            resync()
            check()
        elif action == "read":
            copy.read()
        elif action == "step":
            actions, heard = rest
            batch = engine.step(actions)
            if heard:
                if feed.offer(batch) is Verdict.RESYNC:
                    resync()
                    if feed.offer(batch) is Verdict.RESYNC:
                        feed.force(batch)
                tail_lost = False
                check()
    copy.read()
    # Whatever went wrong, the engine is followed from here on.
    batch = engine.step([("store", 99)])
    if feed.offer(batch) is Verdict.RESYNC:
        resync()
        if feed.offer(batch) is Verdict.RESYNC:
            feed.force(batch)
    tail_lost = False
    check()
    assert 99 in mirror.present()
    copy.read()


def batch(sequence: int, *events: Event, time_seconds: float = 0.0) -> Batch:
    return Batch(sequence, time_seconds or float(sequence + 1), events)


def begun() -> Feed:
    feed = Feed(CacheMirror())
    assert feed.begin_replay() == 0
    assert not feed.end_replay()
    return feed


def test_a_gap_is_filled_by_replay() -> None:
    feed = begun()
    first, second, third = batch(0, stored(1)), batch(1, stored(2)), batch(2, Removed((1,), 0))
    assert feed.offer(first) is Verdict.APPLIED
    assert feed.offer(third) is Verdict.RESYNC
    assert feed.begin_replay() == 0
    for each in (first, second, third):
        feed.replay(each)
    assert not feed.end_replay()
    assert feed.offer(third) is Verdict.REPEATED
    assert feed.mirror.present() == {2}
    assert feed.mirror.complete


def test_a_restart_is_seen_by_the_time_of_the_last_batch() -> None:
    feed = begun()
    feed.offer(batch(0, stored(1)))
    feed.offer(batch(1, stored(2)))
    anew = [batch(each, stored(10 + each), time_seconds=100.0 + each) for each in range(3)]
    assert feed.offer(anew[2]) is Verdict.APPLIED, "in order by accident"
    feed.suspect()
    assert feed.offer(batch(3, time_seconds=103.0)) is Verdict.RESYNC
    feed = begun()
    feed.offer(batch(0, stored(1)))
    feed.offer(batch(1, stored(2)))
    feed.suspect()
    assert feed.offer(anew[2]) is Verdict.RESYNC
    start = feed.begin_replay()
    assert start == 1
    for each in anew[start:]:
        feed.replay(each)
    assert feed.end_replay()
    assert feed.begin_replay() == 0
    for each in anew:
        feed.replay(each)
    assert not feed.end_replay()
    assert feed.mirror.present() == {10, 11, 12}
    assert feed.mirror.complete


def test_without_a_replay_the_mirror_is_incomplete_unless_it_heard_the_first_batch() -> None:
    feed = Feed(CacheMirror(), replayable=False)
    feed.offer(batch(4, stored(1)))
    assert not feed.mirror.complete
    feed = Feed(CacheMirror(), replayable=False)
    feed.offer(batch(0, stored(1)))
    assert feed.mirror.complete


def test_a_mirror_that_would_grow_without_bound_begins_anew() -> None:
    mirror = CacheMirror(blocks_max=3)
    mirror.reset(complete=True)
    mirror.apply([stored(1, 2, 3)])
    epoch = mirror.epoch
    mirror.apply([stored(4)])
    assert mirror.present() == frozenset()
    assert not mirror.complete
    assert mirror.epoch != epoch


def test_only_the_first_group_of_whole_prefixes_counts() -> None:
    mirror = CacheMirror()
    mirror.apply([stored(9, group=1, whole_prefix=False), stored(1, 2, group=0), stored(3, group=2)])
    mirror.apply([Removed((1,), 1), Removed((2,), 0)])
    assert mirror.present() == {1}


def test_the_hash_scheme_is_learned_from_the_first_chain() -> None:
    mirror = CacheMirror()
    tokens = list(range(16))
    mirror.apply([stored(5, parent=4, plain=True, token_ids=tokens)])
    assert mirror.hash_scheme.value == "unknown"
    epoch = mirror.epoch
    mirror.apply([stored(3262291359910021016, plain=True, token_ids=tokens)])
    assert mirror.hash_scheme is HashScheme.SHA256_PICKLE
    assert mirror.epoch != epoch, "readers are told with a snapshot"
    other = CacheMirror()
    other.apply([stored(1, plain=True, token_ids=tokens)])
    assert other.hash_scheme is HashScheme.OTHER
