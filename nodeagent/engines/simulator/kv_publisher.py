"""Publishes KV events over ZMQ as vLLM 0.32 does: a PUB socket, and a ROUTER that repeats the past.

In: events of one step. Out: one message a step: topic, sequence number (8 bytes, from 0 for every
process), msgpack. A replay request is answered with every kept batch from a sequence number on, and
an end marker. Where the socket binds and where it connects, and how ports and paths differ between
data-parallel ranks and the engines of a fleet, follows vLLM's rules.
Must not: block the loop: a subscriber that is too slow loses messages and sees a gap.
"""

import asyncio
from collections import deque
from typing import Any

import msgspec
import zmq

from core.block_hash import ExtraKeys, event_hash
from nodeagent.engines.simulator.kv_journal import BlockRemoved, BlocksStored, KvEvent
from nodeagent.engines.simulator.settings import KvEventSettings

_END = (-1).to_bytes(8, "big", signed=True)
_MEDIUM = "GPU"


def binds(endpoint: str) -> bool:
    """Whether a PUB socket binds this endpoint; it connects to any other."""
    return "*" in endpoint or "::" in endpoint or endpoint.startswith(("ipc://", "inproc://"))


def offset_endpoint(endpoint: str, offset: int) -> str:
    """The endpoint of the rank or engine at an offset: a later port, or a path with a suffix."""
    if not offset:
        return endpoint
    if not endpoint.startswith("tcp://"):
        return f"{endpoint}_{offset}"
    address, _, port = endpoint.rpartition(":")
    return endpoint if int(port) == 0 else f"{address}:{int(port) + offset}"


def _bare(keys: ExtraKeys | None) -> list[str] | None:
    # Events carry the values without their kind, and of an adapter the name only.
    return [key[1] for key in keys] if keys is not None else None


def _stored(event: BlocksStored) -> dict[str, Any]:
    bare = [_bare(keys) for keys in event.extra_keys]
    return {
        "type": "BlockStored",
        "block_hashes": [event_hash(digest) for digest in event.digests],
        "parent_block_hash": event_hash(event.parent) if event.parent is not None else None,
        "token_ids": event.token_ids,
        "block_size": event.block_size_tokens,
        "lora_id": event.lora_id,
        "medium": _MEDIUM,
        "lora_name": event.lora_name,
        "extra_keys": bare,
        "group_idx": 0,
        "kv_cache_spec_kind": "full_attention",
    }


def wire_event(event: KvEvent, *, positional: bool) -> Any:
    """An event as it is packed: a map with names, or an array that begins with the type."""
    if isinstance(event, BlocksStored):
        named = _stored(event)
        # The old form ended with the adapter's name.
        return list(named.values())[:8] if positional else named
    if isinstance(event, BlockRemoved):
        hashes = [event_hash(event.digest)]
        if positional:
            return ["BlockRemoved", hashes, _MEDIUM]
        return {"type": "BlockRemoved", "block_hashes": hashes, "medium": _MEDIUM, "group_idx": 0}
    return ["AllBlocksCleared"] if positional else {"type": "AllBlocksCleared"}


class KvEventPublisher:
    """The sockets of one engine, or of one of its data-parallel ranks."""

    def __init__(self, settings: KvEventSettings, *, rank: int = 0, offset: int = 0) -> None:
        """Opens the sockets; call within a running loop.

        Args:
            settings: Where to publish.
            rank: The data-parallel rank, which every batch carries.
            offset: Ranks and engines before this one in the same process.

        Raises:
            OSError: An endpoint cannot be bound.
        """
        self._settings = settings
        self._rank = rank
        self._encoder = msgspec.msgpack.Encoder()
        self._topic = settings.topic.encode()
        self._sequence = 0
        self._buffer: deque[tuple[int, bytes]] = deque(maxlen=settings.buffer_steps)
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance()
        self.replay_endpoint: str | None = None
        self._publisher = context.socket(zmq.PUB)
        self._publisher.set_hwm(settings.hwm)
        self._replay = context.socket(zmq.ROUTER)
        # A whole buffer fits: a replay that loses its own messages helps nobody.
        self._replay.set_hwm(0)
        try:
            self.endpoint = _open(self._publisher, offset_endpoint(settings.endpoint, offset))
            if settings.replay_endpoint is not None:
                endpoint = offset_endpoint(settings.replay_endpoint, offset)
                self.replay_endpoint = _open(self._replay, endpoint, bind=True)
        except zmq.ZMQError as error:
            self._publisher.close(linger=0)
            self._replay.close(linger=0)
            raise OSError(error.errno, f"KV events: {error.strerror}") from error
        asyncio.get_running_loop().add_reader(self._replay.fileno(), self._answer_replays)

    def publish(self, events: list[KvEvent], time_seconds: float) -> None:
        """Sends what one step brought; nothing where it brought nothing."""
        if not events:
            return
        wire = [wire_event(event, positional=self._settings.positional) for event in events]
        payload = self._encoder.encode([time_seconds, wire, self._rank])
        sequence = self._sequence.to_bytes(8, "big")
        # A PUB socket never blocks: it drops for those who do not keep up.
        self._publisher.send_multipart((self._topic, sequence, payload))
        self._buffer.append((self._sequence, payload))
        self._sequence += 1

    def source(self) -> dict[str, Any]:
        """This publisher in the answer of `GET /kv_event_sources`."""
        return {
            "enable_kv_cache_events": True,
            "publisher": "zmq",
            "endpoint": self.endpoint,
            "replay_endpoint": self.replay_endpoint,
            "buffer_steps": self._settings.buffer_steps,
            "hwm": self._settings.hwm,
            "max_queue_size": self._settings.max_queue_size,
            "topic": self._settings.topic,
        }

    def close(self) -> None:
        """Closes the sockets without waiting for subscribers."""
        asyncio.get_running_loop().remove_reader(self._replay.fileno())
        self._replay.close(linger=0)
        self._publisher.close(linger=0)

    def _answer_replays(self) -> None:
        # The descriptor only tells changes, so everything that waits has to be taken.
        while True:
            try:
                frames = self._replay.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            if len(frames) != 3 or len(frames[2]) != 8:
                continue
            client, start = frames[0], int.from_bytes(frames[2], "big")
            for sequence, payload in self._buffer:
                if sequence >= start:
                    reply = (client, b"", self._topic, sequence.to_bytes(8, "big"), payload)
                    self._replay.send_multipart(reply)
            self._replay.send_multipart((client, b"", b"", _END, b""))


def _open(socket: "zmq.Socket[bytes]", endpoint: str, *, bind: bool = False) -> str:
    """Binds or connects, and returns the endpoint with the port that was chosen."""
    if not bind and not binds(endpoint):
        socket.connect(endpoint)
        return endpoint
    if endpoint != "tcp://*:0":
        socket.bind(endpoint)
        return endpoint
    socket.bind("tcp://127.0.0.1:0")
    return socket.getsockopt_string(zmq.LAST_ENDPOINT)
