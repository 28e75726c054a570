"""One gRPC channel per etcd member, and the rules of failing over between them.

In comes a request and whether it may be sent twice, out comes the answer of the first member that
gives one within the bound. A request that changes state is only sent over a connection that stands,
and once it is sent, silence means "outcome unknown", never a second try. Tokens of etcd's
authentication are fetched, attached and renewed here and appear nowhere else.
"""

import asyncio
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import grpc
import structlog
from aetcd.rpc import rpc_pb2_grpc
from grpc.aio import AioRpcError, Channel, UsageError

from core.store import etcd_wire as wire
from core.store.etcd_settings import EtcdSettings
from core.store.types import StoreUnavailable

_log = structlog.get_logger(__name__)

# Several members share one request's time: a member that hangs may use up a third at most.
_ATTEMPT_SHARE = 3
# A request is sent at most so often; waiting for a connection does not count.
_MAXIMUM_ATTEMPTS = 4
# Pause after a round over all members without a connection.
_ROUND_PAUSE_SECONDS = 0.1
# Connecting to one of several members may take so long, TLS included, before the next one is tried.
_CONNECT_SECONDS = 1.0

_CHANNEL_OPTIONS: tuple[tuple[str, int], ...] = (
    # etcd closes connections that ping more often than every 5 s or while idle.
    ("grpc.keepalive_time_ms", 6_000),
    ("grpc.keepalive_timeout_ms", 3_000),
    ("grpc.keepalive_permit_without_calls", 0),
    ("grpc.http2.max_pings_without_data", 0),
    # A member that restarts is back within a second; grpc's own default waits up to two minutes.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 2_000),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    # Ranges are read in pieces of 1000 keys; etcd refuses values beyond 1.5 MiB.
    ("grpc.max_receive_message_length", 256 * 1024 * 1024),
    ("grpc.use_local_subchannel_pool", 1),
)


@dataclass(frozen=True, slots=True)
class Member:
    """A member's address, channel and stubs."""

    endpoint: str
    channel: Channel
    kv: Any
    lease: Any
    watch: Any
    auth: Any


class Channels:
    """Channels to all members. Lives on the event loop that makes the first call."""

    def __init__(self, settings: EtcdSettings) -> None:
        self._settings = settings
        credentials = settings.channel_credentials()
        self._members = tuple(_open(each, credentials) for each in settings.endpoints)
        # Processes start at different members so that watches spread.
        self._current = random.randrange(len(self._members))  # noqa: S311 - spreads load, hides nothing
        self._token = ""
        self._log_in_lock = asyncio.Lock()
        self._closed = False

    @property
    def closed(self) -> bool:
        """True after `close`."""
        return self._closed

    async def close(self) -> None:
        """Closes all channels; calls under way fail."""
        self._closed = True
        for member in self._members:
            await member.channel.close()

    def rotate(self, away_from: Member) -> None:
        """Makes the next member the first choice, unless another caller did so already."""
        if self._members[self._current] is away_from:
            self._current = (self._current + 1) % len(self._members)

    async def call(
        self,
        method: Callable[[Member], Any],
        request: Any,
        *,
        doing: str,
        may_repeat: bool,
    ) -> Any:
        """Sends a request and returns the answer.

        Args:
            method: Picks the stub's method of a member.
            request: What to send.
            doing: The call in words, for errors.
            may_repeat: True when sending it twice does no harm.

        Raises:
            AioRpcError: A member answered with an error other than unavailability.
            StoreUnavailable: No answer within the bound.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._settings.request_timeout_seconds
        refused_tokens = 0
        for attempt in range(1, _MAXIMUM_ATTEMPTS + 1):
            member = await self.connected(deadline, doing=doing)
            token = await self.token(member, deadline)
            remaining = deadline - loop.time()
            share = self._settings.request_timeout_seconds / _ATTEMPT_SHARE
            shared = may_repeat and len(self._members) > 1 and attempt < _MAXIMUM_ATTEMPTS
            try:
                return await self._send(
                    method(member), request, token, min(remaining, share) if shared else remaining
                )
            except AioRpcError as error:
                if wire.is_token_refused(wire.details_of(error)) and refused_tokens == 0:
                    refused_tokens += 1
                    self.forget_token(token)
                    continue
                if not wire.is_unanswered(error):
                    raise
                self.rotate(member)
                repeatable = may_repeat or wire.is_unsent(error)
                if not repeatable or attempt == _MAXIMUM_ATTEMPTS or loop.time() >= deadline:
                    raise wire.to_store_error(error, doing) from error
                # A restarted member answers "no leader" at once until it has one.
                await asyncio.sleep(min(_ROUND_PAUSE_SECONDS, max(0.0, deadline - loop.time())))
        raise StoreUnavailable(f"etcd kept refusing our token while {doing}")

    async def connected(self, deadline: float, *, doing: str) -> Member:
        """Returns the first member whose connection stands, beginning with the current one.

        Args:
            deadline: Loop time at which to give up.
            doing: The call in words, for the error.

        Raises:
            StoreUnavailable: None could be reached.
        """
        loop = asyncio.get_running_loop()
        patience = _CONNECT_SECONDS if len(self._members) > 1 else float("inf")
        while True:
            for _ in self._members:
                if self._closed:
                    raise StoreUnavailable(f"the store is closed ({doing})")
                member = self._members[self._current]
                if await _is_ready(member.channel, min(patience, deadline - loop.time())):
                    return member
                self.rotate(member)
            if loop.time() >= deadline:
                endpoints = ", ".join(self._settings.endpoints)
                raise StoreUnavailable(
                    f"no etcd member could be reached while {doing} ({endpoints})",
                    metadata={"endpoints": endpoints},
                )
            await asyncio.sleep(min(_ROUND_PAUSE_SECONDS, max(0.0, deadline - loop.time())))

    async def token(self, member: Member, deadline: float) -> str:
        """Returns the token to send; empty where etcd's authentication is not used.

        Raises:
            StoreError: etcd refused the user.
            StoreUnavailable: No answer within the bound.
        """
        if not self._settings.username or self._token:
            return self._token
        async with self._log_in_lock:
            if not self._token:
                self._token = await self._log_in(member, deadline)
            return self._token

    def forget_token(self, token: str) -> None:
        """Drops a token that etcd no longer knows, unless a newer one is there already."""
        if self._token == token:
            self._token = ""

    async def _log_in(self, member: Member, deadline: float) -> str:
        password = await asyncio.to_thread(self._settings.read_password)
        request = wire.authenticate_request(self._settings.username, password)
        remaining = deadline - asyncio.get_running_loop().time()
        try:
            answer = await self._send(member.auth.Authenticate, request, "", remaining)
        except AioRpcError as error:
            if wire.is_unanswered(error):
                self.rotate(member)
            raise wire.to_store_error(error, f"logging in as {self._settings.username}") from error
        _log.info("logged in to etcd", user=self._settings.username, endpoint=member.endpoint)
        return str(answer.token)

    async def _send(self, method: Any, request: Any, token: str, timeout_seconds: float) -> Any:
        try:
            return await method(request, timeout=max(0.001, timeout_seconds), metadata=token_metadata(token))
        except asyncio.CancelledError:
            self.raise_if_closed_under()
            raise
        except UsageError as error:
            raise StoreUnavailable("the store is closed") from error

    def raise_if_closed_under(self) -> None:
        """Raises StoreUnavailable where grpc cancelled a call because its channel was closed.

        grpc reports that as a cancellation of the awaiting task, which nobody asked for.
        """
        task = asyncio.current_task()
        if self._closed and task is not None and not task.cancelling():
            raise StoreUnavailable("the store was closed during the call")


def token_metadata(token: str) -> tuple[tuple[str, str], ...]:
    """Metadata that carries a token, if there is one."""
    return (("token", token),) if token else ()


def _open(endpoint: str, credentials: grpc.ChannelCredentials | None) -> Member:
    channel = (
        grpc.aio.insecure_channel(endpoint, options=_CHANNEL_OPTIONS)
        if credentials is None
        else grpc.aio.secure_channel(endpoint, credentials, options=_CHANNEL_OPTIONS)
    )
    return Member(
        endpoint=endpoint,
        channel=channel,
        kv=rpc_pb2_grpc.KVStub(channel),
        lease=rpc_pb2_grpc.LeaseStub(channel),
        watch=rpc_pb2_grpc.WatchStub(channel),
        auth=rpc_pb2_grpc.AuthStub(channel),
    )


async def _is_ready(channel: Channel, patience_seconds: float) -> bool:
    """Waits until a connection stands; gives up at once where the last attempt has failed."""
    try:
        state = channel.get_state(try_to_connect=True)
        async with asyncio.timeout(max(0.0, patience_seconds)):
            while state is not grpc.ChannelConnectivity.READY:
                if state in {
                    grpc.ChannelConnectivity.TRANSIENT_FAILURE,
                    grpc.ChannelConnectivity.SHUTDOWN,
                }:
                    return False
                await channel.wait_for_state_change(state)
                state = channel.get_state(try_to_connect=True)
    except TimeoutError:
        return False
    except UsageError as error:
        raise StoreUnavailable("the store is closed") from error
    return True
