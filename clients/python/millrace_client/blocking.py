"""The client for code without an event loop: the same methods, called and waited for.

In come the arguments of `MillraceClient`, out come its results; streams become plain iterators. Each
instance owns one event loop and one channel, so it belongs to one thread and must not be used where a
loop already runs.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from types import TracebackType
from typing import Any, Self, TypeVar

from millrace_client.client import MillraceClient

Result = TypeVar("Result")
Item = TypeVar("Item")


class BlockingClient:
    """Runs `MillraceClient` to completion.

    ```python
    with BlockingClient(lambda: MillraceClient.connect("127.0.0.1:7600", token)) as blocking:
        deployments = blocking.run(lambda client: client.list("team-ai"))
        for event in blocking.iterate(lambda client: client.events("team-ai")):
            print(event.reason)
    ```
    """

    def __init__(self, connect: Callable[[], MillraceClient]) -> None:
        """Takes what opens the client; it is called inside the loop."""
        self._runner = asyncio.Runner()
        try:
            self._client = self._runner.run(_open(connect))
        except BaseException:
            self._runner.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends every call and closes channel and loop."""
        self._runner.run(self._client.close())
        self._runner.close()

    def run(self, call: Callable[[MillraceClient], Coroutine[Any, Any, Result]]) -> Result:
        """Makes one call and waits for its result.

        Raises:
            MillraceError: As the method says.
        """
        return self._runner.run(call(self._client))

    def iterate(self, open_stream: Callable[[MillraceClient], AsyncIterator[Item]]) -> Iterator[Item]:
        """Yields the items of a stream; leaving the loop closes it.

        Raises:
            MillraceError: As the method says.
        """
        stream = open_stream(self._client)
        try:
            while True:
                try:
                    yield self._runner.run(_next(stream))
                except StopAsyncIteration:
                    return
        finally:
            self._runner.run(_close(stream))


async def _open(connect: Callable[[], MillraceClient]) -> MillraceClient:
    return connect()


async def _next(stream: AsyncIterator[Item]) -> Item:
    return await anext(stream)


async def _close(stream: AsyncIterator[Item]) -> None:
    close = getattr(stream, "aclose", None)
    if close is not None:
        await close()
