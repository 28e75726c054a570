"""Services run side by side, end together, and are always awaited."""

import asyncio

import pytest

from core.tasks import run_services


async def _forever(log: list[str], name: str) -> None:
    try:
        await asyncio.Event().wait()
    finally:
        log.append(name)


async def test_stop_ends_all_after_draining() -> None:
    log: list[str] = []
    stop = asyncio.Event()

    async def drain() -> None:
        log.append("drained")

    async def stopper() -> None:
        await asyncio.sleep(0.01)
        stop.set()
        await asyncio.Event().wait()

    await run_services(
        {"a": _forever(log, "a"), "b": _forever(log, "b"), "s": stopper()}, stop=stop, on_stop=drain
    )
    assert log[0] == "drained"
    assert sorted(log[1:]) == ["a", "b"]


async def test_a_failing_service_ends_the_others_and_is_raised() -> None:
    log: list[str] = []

    async def fails() -> None:
        await asyncio.sleep(0)
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        await run_services({"a": _forever(log, "a"), "f": fails()}, stop=asyncio.Event())
    assert log == ["a"]


async def test_a_service_must_not_return() -> None:
    async def returns() -> None:
        await asyncio.sleep(0)

    with pytest.raises(RuntimeError, match="r ended"):
        await run_services({"r": returns()}, stop=asyncio.Event())
