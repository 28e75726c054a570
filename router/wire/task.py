"""A task that begins at once, and a signal that resumes it at once: no turn of the event loop in between.

    EagerTask(coroutine)   runs the coroutine up to its first wait before the constructor returns
    Signal                 what it waits for on the hot path; `set` goes on with it inside the call

A request of the hot path is served in two or three callbacks of sockets. As an `asyncio.Task` it would cost a
turn of the loop and a future for each of them. Everything else of asyncio works inside an `EagerTask` as in
any task (futures, timeouts, task groups, cancelling), because it keeps asyncio's contract for third-party
tasks; only `asyncio.all_tasks` does not list it, so whoever makes one must know when it ends (`on_done`).

In comes a coroutine, out goes its end. What it raises is the business of `on_done`, which must not raise.
"""

import asyncio
from asyncio import CancelledError, current_task

# "Extending asyncio, Task lifetime support" of Python's manual: for other implementations of tasks.
from asyncio.tasks import _enter_task, _leave_task
from collections.abc import Callable, Coroutine, Generator
from typing import Any


class _Running:
    """The eager task whose coroutine is on the stack; None while there is none."""

    task: "EagerTask | None" = None


class Signal:
    """Something that happens once and that at most one task waits for.

    Attributes:
        is_set: It has happened.
    """

    __slots__ = ("_future", "_task", "is_set")

    def __init__(self) -> None:
        self.is_set = False
        self._task: EagerTask | None = None
        self._future: asyncio.Future[None] | None = None

    def set(self) -> None:
        """Lets the waiting task go on, inside this call where it is an eager one; again does nothing."""
        if self.is_set:
            return
        self.is_set = True
        task = self._task
        if task is not None:
            self._task = None
            task.resume()
        elif self._future is not None and not self._future.done():
            self._future.set_result(None)

    def __await__(self) -> Generator[Any, None, None]:
        if self.is_set:
            return
        task = _Running.task
        if task is not None:
            self._task = task
            try:
                yield self
            finally:
                self._task = None
        else:
            self._future = asyncio.get_running_loop().create_future()
            yield from self._future


class EagerTask:
    """Runs a coroutine to its end.

    Attributes:
        done: It has ended.
    """

    __slots__ = (
        "__weakref__", "_cancel_message", "_cancels", "_coroutine", "_loop", "_must_cancel", "_on_done",
        "_waits_for", "done",
    )  # fmt: skip

    def __init__(
        self,
        coroutine: Coroutine[Any, Any, None],
        loop: asyncio.AbstractEventLoop,
        on_done: Callable[[BaseException | None], None],
    ) -> None:
        """Starts; must be called on the event loop and outside of any task.

        Args:
            coroutine: What to run.
            loop: The running loop.
            on_done: Called once with what ended it; None for a normal end.
        """
        self.done = False
        self._coroutine = coroutine
        self._loop = loop
        self._on_done = on_done
        self._cancels = 0
        self._must_cancel = False
        self._cancel_message: Any = None
        self._waits_for: Any = None
        self._step(None)

    def resume(self) -> None:
        """Goes on after a signal: now, or as soon as the task that is running at the moment waits."""
        if _Running.task is None and current_task(self._loop) is None:
            self._step(None)
        else:
            self._loop.call_soon(self._step, None)

    def _step(self, error: BaseException | None) -> None:
        if self.done:
            return
        if self._must_cancel:
            self._must_cancel = False
            error = CancelledError() if self._cancel_message is None else CancelledError(self._cancel_message)
        self._waits_for = None
        loop: Any = self._loop
        waits_for: Any = None
        ended: BaseException | None = None
        _enter_task(loop, self)  # type: ignore[arg-type]  # any object that keeps the contract of tasks
        _Running.task = self
        try:
            waits_for = self._coroutine.send(None) if error is None else self._coroutine.throw(error)
        except StopIteration:
            self.done = True
        except BaseException as raised:
            self.done = True
            ended = raised
            if not isinstance(raised, (Exception, CancelledError)):
                # The process is told to end; whoever counts this task is told as well.
                self._on_done(raised)
                raise
        finally:
            _Running.task = None
            _leave_task(loop, self)  # type: ignore[arg-type]
        if self.done:
            self._on_done(ended)
            return
        self._waits_for = waits_for
        if waits_for is None:
            # A bare yield, such as asyncio.sleep(0): the others first.
            loop.call_soon(self._step, None)
        elif type(waits_for) is not Signal:
            waits_for._asyncio_future_blocking = False  # noqa: SLF001 - asyncio's contract of tasks and futures
            waits_for.add_done_callback(self._wake)
        if self._must_cancel:
            self._interrupt()

    def _wake(self, future: "asyncio.Future[Any]") -> None:
        # The future raises its own error inside the coroutine when that goes on.
        del future
        self._step(None)

    def _interrupt(self) -> None:
        """Has the coroutine raise CancelledError at its present wait."""
        waits_for = self._waits_for
        if isinstance(waits_for, Signal):
            waits_for._task = None  # noqa: SLF001 - one module: nobody may resume it in between
            self._loop.call_soon(self._step, None)
        elif waits_for is not None and waits_for.cancel():
            # The future raises the error itself.
            self._must_cancel = False

    # What asyncio.timeout, TaskGroup and others ask of the current task.

    def cancel(self, msg: Any = None) -> bool:
        """Has the coroutine raise CancelledError at its next wait; False when it has ended."""
        if self.done:
            return False
        self._cancels += 1
        if self._must_cancel:
            return True
        self._must_cancel = True
        self._cancel_message = msg
        if current_task(self._loop) is not self:  # type: ignore[comparison-overlap]  # it may be any task
            self._interrupt()
        return True

    def cancelling(self) -> int:
        """Returns how often it was cancelled and not un-cancelled."""
        return self._cancels

    def uncancel(self) -> int:
        """Takes one cancellation back; returns how many are left."""
        if self._cancels > 0:
            self._cancels -= 1
        return self._cancels

    def get_name(self) -> str:
        """Names it for logs."""
        return "eager"

    def get_loop(self) -> asyncio.AbstractEventLoop:
        """Returns its loop."""
        return self._loop
