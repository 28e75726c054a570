"""How a unary call is made: with a deadline, and with a bounded number of attempts.

In comes a gRPC method and its request, out comes the response or an error of `errors`. Only UNAVAILABLE
is retried; mutations carry a request id, so that a second attempt changes nothing twice. It must not
outlive the caller's timeout: attempts and waits share one budget.
"""

import asyncio
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import grpc

from millrace_client import errors
from millrace_client.rpc_status import from_rpc_error

Request = TypeVar("Request")
Response = TypeVar("Response")

# Four attempts within about a second bridge the restart of a connection. A longer outage is for the
# caller to see.
ATTEMPTS_MAX = 4
BACKOFF_INITIAL_SECONDS = 0.1
BACKOFF_MAXIMUM_SECONDS = 2.0

Metadata = tuple[tuple[str, str], ...]


def ended_by_peer() -> bool:
    """Tells, inside `except CancelledError`, whether the server cancelled the call and not our own task.

    grpc.aio raises the same exception for both.
    """
    task = asyncio.current_task()
    return task is not None and task.cancelling() == 0


def backoff_seconds(failures: int) -> float:
    """Returns the wait after so many failures in a row: exponential, capped, half of it jitter."""
    ceiling = min(BACKOFF_MAXIMUM_SECONDS, BACKOFF_INITIAL_SECONDS * 2.0 ** min(max(failures - 1, 0), 16))
    # Jitter spreads clients that failed together; it protects nothing secret.
    return ceiling * (1.0 - 0.5 * random.random())  # noqa: S311 - no secret hangs on it


@dataclass(frozen=True, slots=True)
class Caller:
    """Makes calls to one control plane.

    Attributes:
        target: host:port, for messages.
        metadata: What authenticates each call; a function, so that a rotated token is picked up.
        timeout_seconds: Budget of a call with all its attempts.
    """

    target: str
    metadata: Callable[[], Metadata]
    timeout_seconds: float

    async def call(
        self,
        method: grpc.aio.UnaryUnaryMultiCallable[Request, Response],
        request: Request,
        *,
        timeout_seconds: float | None = None,
    ) -> Response:
        """Calls with a deadline and retries while nobody answers.

        Raises:
            MillraceError: One of the tree in `errors`.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + (timeout_seconds or self.timeout_seconds)
        failures = 0
        while True:
            remaining_seconds = max(deadline - loop.time(), 0.001)
            cause: BaseException
            try:
                return await method(request, timeout=remaining_seconds, metadata=self.metadata())
            except grpc.aio.AioRpcError as error:
                cause, failure = error, from_rpc_error(error, target=self.target)
            except asyncio.CancelledError as error:
                if not ended_by_peer():
                    raise
                cause, failure = error, errors.Unavailable(f"the server at {self.target} ended the call")
            failures += 1
            wait_seconds = backoff_seconds(failures)
            retry = type(failure) is errors.Unavailable and failures < ATTEMPTS_MAX
            if not retry or loop.time() + wait_seconds >= deadline:
                raise failure from cause
            await asyncio.sleep(wait_seconds)
