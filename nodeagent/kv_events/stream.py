"""Turns a mirror into the messages of one router's stream: snapshot or resumption, then changes.

In: a mirror and where the router stopped. Out: messages until the engine is gone. There is no queue: a
router that is too slow for the kept changes gets a new snapshot.
"""

import asyncio
from collections.abc import AsyncGenerator

from millrace.agent.v1 import node_agent_service_pb2 as messages

from nodeagent.kv_events.mirror import CacheMirror, Change, HashScheme

# 64 KiB of hashes a message: far below gRPC's limit, and other streams get their turn in between.
PART_HASHES = 8192
# A router that hears nothing for several of these knows that the agent is gone.
PROGRESS_SECONDS = 5.0

_SCHEMES = {
    HashScheme.UNKNOWN: messages.KV_HASH_SCHEME_UNSPECIFIED,
    HashScheme.SHA256_PICKLE: messages.KV_HASH_SCHEME_SHA256_PICKLE,
    HashScheme.OTHER: messages.KV_HASH_SCHEME_OTHER,
}


async def follow(
    mirror: CacheMirror, epoch: str, sequence: int, *, progress_seconds: float = PROGRESS_SECONDS
) -> AsyncGenerator[messages.StreamKvEventsResponse, None]:
    """Yields what keeps a copy of the mirror, until the engine is gone.

    Args:
        mirror: What to copy.
        epoch: Epoch of what the reader has, empty for nothing.
        sequence: Sequence of what the reader has.
        progress_seconds: Between signs of life.
    """
    while not mirror.closed:
        changes = mirror.changes_after(epoch, sequence)
        if changes is None:
            epoch, sequence = mirror.epoch, mirror.sequence
            for message in _snapshot(mirror):
                yield message
        elif changes:
            for change in changes:
                yield _message(epoch, change)
            sequence = changes[-1].sequence
        else:
            try:
                async with asyncio.timeout(progress_seconds):
                    await mirror.wait()
            except TimeoutError:
                yield messages.StreamKvEventsResponse(epoch=epoch, sequence=sequence, progress=True)


def _snapshot(mirror: CacheMirror) -> list[messages.StreamKvEventsResponse]:
    """The snapshot's messages, all made before the first is sent, so that they belong together."""
    hashes = list(mirror.present())
    made = [
        messages.StreamKvEventsResponse(
            epoch=mirror.epoch,
            sequence=mirror.sequence,
            snapshot_part=messages.KvSnapshotPart(block_hashes=hashes[start : start + PART_HASHES]),
        )
        for start in range(0, max(1, len(hashes)), PART_HASHES)
    ]
    end = messages.KvSnapshotEnd(
        incarnation=mirror.incarnation,
        block_tokens=mirror.block_tokens,
        hash_scheme=_SCHEMES[mirror.hash_scheme],
        complete=mirror.complete,
    )
    made.append(
        messages.StreamKvEventsResponse(epoch=mirror.epoch, sequence=mirror.sequence, snapshot_end=end)
    )
    return made


def _message(epoch: str, change: Change) -> messages.StreamKvEventsResponse:
    return messages.StreamKvEventsResponse(
        epoch=epoch,
        sequence=change.sequence,
        change=messages.KvChange(
            cleared=change.cleared,
            removed_block_hashes=change.removed,
            stored_block_hashes=change.stored,
        ),
    )
