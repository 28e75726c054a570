"""A deployment's life as a WebSocket: status, events and logs, replayed and then followed.

In come a path and a credential, out come JSON messages with a `type`: `status`, `event`, `log`,
`snapshot_end` (status and kept events are complete), `error` (the last message). The credential is the
`Authorization` header or, for browsers, which cannot set it, the subprotocol `bearer.<token>`; never the
URL, which ends up in logs.
"""

import asyncio
import json
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing
from typing import Any

import structlog
from aiohttp import WSCloseCode, WSMsgType, web
from millrace.core.v1 import event_pb2, types_pb2
from millrace.scheduler.v1 import scheduler_service_pb2 as messages

from controlplane.gateway import render
from controlplane.gateway.backend import Backend
from controlplane.gateway.bodies import query_of
from controlplane.gateway.requests import BACKEND, REQUEST_ID, STOPPING
from core.errors import MillraceError
from core.tasks import cancel_and_wait
from core.telemetry import REQUEST_ID_HEADER

_log = structlog.get_logger(__name__)

ROUTE = "/v1/deployments/{namespace}/{name}/watch"
SUBPROTOCOL = "millrace.v1"
_BEARER = "bearer."
# Between the streams and a slow client; behind it gRPC's flow control holds the streams back.
_QUEUE_LENGTH = 1000
# A dead client is noticed by its missing pong.
_PING_SECONDS = 15.0
# A client that takes no message for so long is gone, or as good as gone.
_SEND_SECONDS = 30.0
# After a deletion, how long the stream stays for the events that tell of it.
_LAST_EVENTS_SECONDS = 1.0
# What clients send is read only to notice that they go.
_CLIENT_MESSAGE_BYTES_MAX = 4096


def add_routes(app: web.Application) -> None:
    """Adds the route."""
    app.router.add_get(ROUTE, _watch, allow_head=False)


async def close_all(app: web.Application) -> None:
    """Tells every open WebSocket that the server goes."""
    sockets = app[STOPPING]
    for socket in tuple(sockets):
        await socket.close(code=WSCloseCode.GOING_AWAY, message=b"the control plane stops")


async def _watch(request: web.Request) -> web.StreamResponse:
    query_of(request.query, ())
    namespace, name = request.match_info["namespace"], request.match_info["name"]
    authorization = _authorization(request)
    # Refused before the upgrade, so that callers get a plain HTTP answer.
    await request.app[BACKEND].call(
        "GetDeployment",
        messages.GetDeploymentRequest(namespace=namespace, name=name),
        authorization=authorization,
        request_id=request[REQUEST_ID],
    )
    socket = web.WebSocketResponse(
        protocols=_acceptable(request), heartbeat=_PING_SECONDS, max_msg_size=_CLIENT_MESSAGE_BYTES_MAX
    )
    socket.headers[REQUEST_ID_HEADER] = request[REQUEST_ID]
    await socket.prepare(request)
    request.app[STOPPING].add(socket)
    session = _Session(
        request.app[BACKEND], namespace, name, authorization=authorization, request_id=request[REQUEST_ID]
    )
    try:
        await session.serve(socket)
    finally:
        request.app[STOPPING].discard(socket)
    return socket


class _Session:
    """One open WebSocket."""

    def __init__(
        self, backend: Backend, namespace: str, name: str, *, authorization: str, request_id: str
    ) -> None:
        self._backend = backend
        self._namespace = namespace
        self._name = name
        self._authorization = authorization
        self._request_id = request_id
        self._queue: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue(_QUEUE_LENGTH)
        self._snapshots_missing = 2

    async def serve(self, socket: web.WebSocketResponse) -> None:
        """Serves until the client goes, the deployment is deleted or a stream fails."""
        tasks = [
            asyncio.create_task(self._guarded(self._status()), name="watch-status"),
            asyncio.create_task(self._guarded(self._events()), name="watch-events"),
            asyncio.create_task(self._guarded(self._logs()), name="watch-logs"),
        ]
        reader = asyncio.create_task(_read_until_closed(socket), name="watch-reader")
        sender = asyncio.create_task(self._send(socket), name="watch-sender")
        try:
            await asyncio.wait({reader, sender}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            await cancel_and_wait(reader, sender, *tasks)
            if not socket.closed:
                await socket.close(code=WSCloseCode.OK)

    async def _send(self, socket: web.WebSocketResponse) -> None:
        while (message := await self._queue.get()) is not None:
            try:
                async with asyncio.timeout(_SEND_SECONDS):
                    await socket.send_str(json.dumps(message, ensure_ascii=False, separators=(",", ":")))
            except (TimeoutError, ConnectionError) as error:
                _log.info("watcher gone", namespace=self._namespace, error=repr(error))
                return

    async def _guarded(self, work: Coroutine[Any, Any, None]) -> None:
        """Runs one stream; its failure is the last thing that the client hears."""
        try:
            await work
        except MillraceError as error:
            await self._queue.put({"type": "error", "reason": error.reason, "message": error.message})
            await self._queue.put(None)

    async def _status(self) -> None:
        request = messages.WatchDeploymentsRequest(namespace=self._namespace, name=self._name)
        async with aclosing(self._stream("WatchDeployments", request)) as stream:
            async for message in stream:
                match message.WhichOneof("kind"):
                    case "changed":
                        resource = render.deployment(message.changed).model_dump(mode="json", by_alias=True)
                        await self._queue.put({"type": "status", "deployment": resource})
                    case "deleted":
                        await self._queue.put({"type": "status", "deployment": None})
                        # The events that tell of the end are written by others, at about this moment.
                        await asyncio.sleep(_LAST_EVENTS_SECONDS)
                        await self._queue.put(None)
                        return
                    case "snapshot_end":
                        await self._snapshot_ended()
                    case _:
                        # Progress, or what a newer control plane says.
                        continue

    async def _events(self) -> None:
        request = messages.WatchEventsRequest(namespace=self._namespace, deployment=self._name, follow=True)
        async with aclosing(self._stream("WatchEvents", request)) as stream:
            async for message in stream:
                match message.WhichOneof("kind"):
                    case "event":
                        await self._queue.put(_event(message.event))
                    case "snapshot_end":
                        await self._snapshot_ended()
                    case _:
                        continue

    async def _logs(self) -> None:
        request = messages.StreamDeploymentLogsRequest(
            namespace=self._namespace, name=self._name, follow=True
        )
        async with aclosing(self._stream("StreamDeploymentLogs", request)) as stream:
            async for message in stream:
                await self._queue.put(
                    {
                        "type": "log",
                        "replica": message.replica,
                        "node": message.node,
                        "line": message.line,
                    }
                )

    async def _snapshot_ended(self) -> None:
        self._snapshots_missing -= 1
        if self._snapshots_missing == 0:
            await self._queue.put({"type": "snapshot_end"})

    def _stream(self, method: str, request: Any) -> AsyncGenerator[Any, None]:
        return self._backend.stream(
            method, request, authorization=self._authorization, request_id=self._request_id
        )


def _event(event: event_pb2.Event) -> dict[str, Any]:
    warning = event.severity == types_pb2.EVENT_SEVERITY_WARNING
    return {
        "type": "event",
        "id": event.id,
        "time": render.moment(event.time),
        "severity": "warning" if warning else "normal",
        "reason": event.reason,
        "message": event.message,
        "source": event.source,
        "replica": event.replica,
        "node": event.node,
    }


async def _read_until_closed(socket: web.WebSocketResponse) -> None:
    async for message in socket:
        if message.type in {WSMsgType.ERROR, WSMsgType.CLOSE}:
            return


def _offered(request: web.Request) -> list[str]:
    header = request.headers.get("Sec-WebSocket-Protocol", "")
    return [each.strip() for each in header.split(",") if each.strip()]


def _authorization(request: web.Request) -> str:
    header = request.headers.get("Authorization", "")
    if header:
        return header
    token = next((each for each in _offered(request) if each.startswith(_BEARER)), "")
    return f"Bearer {token.removeprefix(_BEARER)}" if token else ""


def _acceptable(request: web.Request) -> tuple[str, ...]:
    """Subprotocols to agree to. Browsers drop a connection whose offer is not taken up."""
    offered = _offered(request)
    if SUBPROTOCOL in offered:
        return (SUBPROTOCOL,)
    return tuple(each for each in offered if each.startswith(_BEARER))[:1]
