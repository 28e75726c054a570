"""The gateway's gRPC side: one channel to the control plane's own services, the caller's credential on it.

In come requests with what the caller sent as `Authorization`, out come responses or our own errors. It
holds no credential itself, so that it can do nothing that its caller may not.
"""

from collections.abc import AsyncGenerator
from typing import Any, TypeVar

import grpc
import structlog
from millrace.scheduler.v1 import scheduler_service_pb2_grpc

from core.rpc import TlsFiles, open_channel
from core.rpc_errors import from_rpc_error
from core.telemetry import REQUEST_ID_HEADER, TRACE_PARENT_HEADER, new_trace_parent

Response = TypeVar("Response")

# A declaration may read a hundred models, some of them from a hub that does not answer.
CALL_SECONDS = 60.0


class Backend:
    """Calls SchedulerService for a caller."""

    def __init__(self, target: str, *, tls: TlsFiles | None = None) -> None:
        self._channel = open_channel(target, tls=tls)
        self.stub: Any = scheduler_service_pb2_grpc.SchedulerServiceStub(self._channel)

    async def close(self) -> None:
        """Closes the channel."""
        await self._channel.close()

    async def call(self, method: str, request: Any, *, authorization: str, request_id: str) -> Any:
        """Makes a unary call.

        Raises:
            MillraceError: What the service refused with.
        """
        try:
            return await getattr(self.stub, method)(
                request, metadata=_metadata(authorization, request_id), timeout=CALL_SECONDS
            )
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from error

    async def stream(
        self, method: str, request: Any, *, authorization: str, request_id: str
    ) -> AsyncGenerator[Any, None]:
        """Makes a streaming call, which ends when the generator is closed.

        Raises:
            MillraceError: What the service refused with.
        """
        call = getattr(self.stub, method)(request, metadata=_metadata(authorization, request_id))
        try:
            async for message in call:
                yield message
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from error
        finally:
            call.cancel()


def _metadata(authorization: str, request_id: str) -> tuple[tuple[str, str], ...]:
    identified: tuple[tuple[str, str], ...] = ((REQUEST_ID_HEADER, request_id),)
    # gRPC refuses other characters with an error of its own; such a credential is none anyway.
    usable = authorization.isascii() and authorization.isprintable()
    trace_id = structlog.contextvars.get_contextvars().get("trace_id")
    if trace_id:
        identified = (*identified, (TRACE_PARENT_HEADER, new_trace_parent(trace_id)))
    return (("authorization", authorization), *identified) if authorization and usable else identified
