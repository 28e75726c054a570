"""A task that begins and goes on at once, and in which asyncio works as in any other."""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from router.wire.task import EagerTask, Signal

Ends = list[BaseException | None]


async def _outside_of_tasks(make: Callable[[], Any]) -> Any:
    """Runs a function as a callback of the loop: no task is current there."""
    made: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
    asyncio.get_running_loop().call_soon(lambda: made.set_result(make()))
    return await made


async def _start(body: Coroutine[Any, Any, None], ends: Ends) -> EagerTask:
    loop = asyncio.get_running_loop()
    task = await _outside_of_tasks(lambda: EagerTask(body, loop, ends.append))
    assert isinstance(task, EagerTask)
    return task


async def _until(condition: Callable[[], bool]) -> None:
    for _ in range(20):
        if condition():
            return
        await asyncio.sleep(0)
    raise AssertionError("it did not come about")


async def test_it_runs_to_its_first_wait_before_its_maker_goes_on() -> None:
    steps: list[str] = []
    signal = Signal()

    async def body() -> None:
        steps.append("began")
        await signal
        steps.append("went on")

    ends: Ends = []

    def make() -> None:
        EagerTask(body(), asyncio.get_running_loop(), ends.append)
        steps.append("made")
        signal.set()
        steps.append("set")

    await _outside_of_tasks(make)
    assert steps == ["began", "made", "went on", "set"]
    assert ends == [None]


async def test_a_signal_that_is_set_does_not_wait() -> None:
    signal = Signal()
    signal.set()
    signal.set()
    await signal
    ends: Ends = []
    task = await _start(_wait(signal), ends)
    assert task.done
    assert ends == [None]


async def test_a_signal_also_resumes_an_ordinary_task() -> None:
    signal = Signal()
    task = asyncio.create_task(_wait(signal))
    await asyncio.sleep(0)
    signal.set()
    await task


async def test_a_signal_set_by_another_task_resumes_it_when_that_waits() -> None:
    signal = Signal()
    ends: Ends = []
    await _start(_wait(signal), ends)
    signal.set()
    assert ends == []
    await _until(lambda: ends == [None])


async def test_futures_timeouts_and_groups_work_in_it() -> None:
    seen: list[str] = []

    async def body() -> None:
        await asyncio.sleep(0)
        try:
            async with asyncio.timeout(0):
                await asyncio.Event().wait()
        except TimeoutError:
            seen.append("timeout of a future")
        try:
            async with asyncio.timeout(0):
                await Signal()
        except TimeoutError:
            seen.append("timeout of a signal")
        async with asyncio.TaskGroup() as group:
            group.create_task(asyncio.sleep(0))
        seen.append("group")

    ends: Ends = []
    task = await _start(body(), ends)
    await _until(lambda: task.done)
    assert seen == ["timeout of a future", "timeout of a signal", "group"]
    assert ends == [None]
    assert task.cancelling() == 0


async def test_cancelling_interrupts_whatever_it_waits_for() -> None:
    waits: list[Callable[[], Awaitable[Any]]] = [
        Signal,
        lambda: asyncio.get_running_loop().create_future(),
        asyncio.Event().wait,
    ]
    for wait in waits:
        ends: Ends = []
        cleaned: list[bool] = []
        task = await _start(_wait_and_clean(wait(), cleaned), ends)
        assert task.cancel()
        await _until(lambda task=task: task.done)  # type: ignore[misc]
        assert isinstance(ends[0], asyncio.CancelledError)
        assert cleaned == [True]
        assert not task.cancel()


async def test_a_signal_after_cancelling_changes_nothing() -> None:
    signal = Signal()
    ends: Ends = []
    task = await _start(_wait(signal), ends)
    task.cancel()
    signal.set()
    await _until(lambda: task.done)
    assert isinstance(ends[0], asyncio.CancelledError)


async def test_what_it_raises_is_handed_over() -> None:
    async def body() -> None:
        raise ValueError("broken")

    ends: Ends = []
    task = await _start(body(), ends)
    assert task.done
    assert isinstance(ends[0], ValueError)


async def _wait(signal: Signal) -> None:
    await signal


async def _wait_and_clean(wait: Awaitable[Any], cleaned: list[bool]) -> None:
    try:
        await wait
    finally:
        cleaned.append(True)
