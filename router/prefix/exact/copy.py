"""A copy of which blocks one engine's prefix cache holds, kept from its agent's stream.

In come the messages of `StreamKvEvents`, out comes how many leading blocks of a chain are present. A copy
is believed only while its stream lives: it is complete, of the engine run that the endpoint names, of hashes
that can be worked out here, and heard of lately. In all other cases it says that it does not know. Pure.
"""

from collections.abc import Sequence

from millrace.agent.v1 import node_agent_service_pb2 as messages

# Blocks of one cache, at about 100 bytes each; large engines have a tenth of it. One that has more is not
# copied.
BLOCKS_MAX = 2**20
# Agents give a sign of life every 5 s.
SILENCE_SECONDS_MAX = 12.0


class MalformedStreamError(ValueError):
    """A stream that does not follow the contract."""


class CacheCopy:
    """What one engine holds.

    Attributes:
        epoch: Numbering of the last message that was applied; empty before the first.
        sequence: Its number.
        incarnation: Engine run that it mirrors; empty before the first snapshot is complete.
        block_tokens: Tokens a block; 0 is unknown.
    """

    __slots__ = (
        "_computable",
        "_gathering",
        "_heard_seconds",
        "_present",
        "block_tokens",
        "epoch",
        "incarnation",
        "sequence",
    )

    def __init__(self) -> None:
        self.epoch = ""
        self.sequence = 0
        self.incarnation = ""
        self.block_tokens = 0
        self._present: set[int] = set()
        self._gathering: set[int] | None = None
        self._computable = False
        self._heard_seconds = float("-inf")

    def __len__(self) -> int:
        return len(self._present)

    def begin_stream(self) -> None:
        """A new stream begins: it goes on where the last message ended, not amid a snapshot."""
        if self._gathering is not None:
            self.forget()

    def apply(self, message: messages.StreamKvEventsResponse, now_seconds: float) -> None:
        """Takes one message over.

        Raises:
            MalformedStreamError: It does not follow from the messages before. Nothing is known any more.
        """
        kind = message.WhichOneof("kind")
        if kind == "snapshot_part":
            if self._gathering is None:
                self.forget()
                self._gathering = set()
            self._gathering.update(message.snapshot_part.block_hashes)
        elif kind == "snapshot_end":
            self._end_snapshot(message.snapshot_end)
        elif self._gathering is not None or message.epoch != self.epoch:
            self._fail("a change comes before its snapshot is complete")
        elif kind == "change":
            self._change(message)
        if len(self._present) + len(self._gathering or ()) > BLOCKS_MAX:
            self._fail(f"an engine with more than {BLOCKS_MAX} blocks")
        if self._gathering is None:
            # What a snapshot brings in parts is no place to go on from.
            self.epoch, self.sequence = message.epoch, message.sequence
        self._heard_seconds = now_seconds

    def _end_snapshot(self, end: messages.KvSnapshotEnd) -> None:
        if self._gathering is None:
            self._fail("a snapshot ends that has not begun")
        self._present, self._gathering = self._gathering or set(), None
        self.incarnation = end.incarnation
        self.block_tokens = end.block_tokens
        self._computable = (
            end.complete and end.block_tokens > 0 and end.hash_scheme == messages.KV_HASH_SCHEME_SHA256_PICKLE
        )

    def _change(self, message: messages.StreamKvEventsResponse) -> None:
        if message.sequence != self.sequence + 1:
            self._fail(f"change {message.sequence} follows {self.sequence}")
        if message.change.cleared:
            self._present.clear()
        self._present.difference_update(message.change.removed_block_hashes)
        self._present.update(message.change.stored_block_hashes)

    def _fail(self, why: str) -> None:
        self.forget()
        raise MalformedStreamError(why)

    def forget(self) -> None:
        """Knows nothing any more; the next stream begins with a snapshot."""
        self.epoch, self.sequence, self.incarnation, self.block_tokens = "", 0, "", 0
        self._present = set()
        self._gathering = None
        self._computable = False

    def knows(self, incarnation: str, now_seconds: float) -> bool:
        """Tells whether it can be believed about a run of the engine."""
        return (
            self._computable
            and self._gathering is None
            and self.incarnation == incarnation
            and now_seconds - self._heard_seconds <= SILENCE_SECONDS_MAX
        )

    def leading_blocks(self, chain: Sequence[int]) -> int:
        """Returns how many leading blocks of a chain are present.

        A block may outlive the one before it, so this is a walk, and it ends at the first that is absent.
        """
        present = self._present
        count = 0
        for digest in chain:
            if digest not in present:
                break
            count += 1
        return count
