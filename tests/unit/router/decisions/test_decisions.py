"""What is kept of choices, how it is shown, and how workers ask each other."""

import asyncio
import socket
from dataclasses import replace
from pathlib import Path

import pytest

from core.tasks import cancel_and_wait
from router.decisions.log import DecisionLog, Step
from router.decisions.render import render_decision
from router.decisions.siblings import Siblings
from router.decisions.why import why_of
from router.picking.contract import Candidate, RequestContext
from router.picking.registry import build_strategy
from router.record import RequestRecord
from router.view.view import EndpointState
from tests.support.candidates import candidate, endpoint, request, sample
from tests.support.waiting import eventually


class Seen:
    def __init__(self, candidates: list[Candidate]) -> None:
        self._candidates = candidates

    def candidates(self) -> list[Candidate]:
        return self._candidates


def _names(folder: Path) -> list[str]:
    return [each.name for each in folder.iterdir()]


def _record(request_id: str) -> RequestRecord:
    return RequestRecord(request_id, "t", "p", "POST", "/v1/completions", 10.0, namespace="a")


def _step(context: RequestContext | None = None, strategy: str = "prefix=3,load=1") -> Step:
    seen = sample(running=3, waiting=1, kv=0.5)
    candidates = [candidate("r0", in_flight=2, cached=64, seen=seen), candidate("r1", in_flight=0)]
    free = [each.endpoint for each in candidates]
    full, dead = endpoint("r2"), endpoint("r3")
    draining = endpoint("r4", EndpointState.DRAINING)
    return Step(
        context or request(tokens=64),
        build_strategy(strategy),
        endpoints=[*free, full, dead, draining],
        eligible=[*free, full],
        free=free,
        considered=Seen(candidates),
        chosen=candidates[0],
        why="prefix",
        at_seconds=10.5,
    )


def test_every_endpoint_is_shown_with_its_scores_or_with_what_left_it_out() -> None:
    log = DecisionLog()
    log.open(_record("x"), _step())
    found = log.find("x")
    assert found is not None
    shown = render_decision(found, wall_seconds=lambda moment: moment + 1000)
    assert (shown["request_id"], shown["time"], shown["prompt_tokens_estimated"]) == ("x", 1010.0, 64)
    (choice,) = shown["choices"]
    assert (choice["chosen"], choice["why"], choice["after_ms"]) == ("r0", "prefix", 500.0)
    rows = {each["replica"]: each for each in choice["candidates"]}
    assert rows["r0"]["scores"]["PrefixAware"] == {"score": 1.0, "weight": 3.0}
    assert rows["r0"]["sample"] == {
        "age_seconds": 10.5,
        "running_requests": 3,
        "waiting_requests": 1,
        "kv_usage_ratio": 0.5,
    }
    assert rows["r0"]["score"] > rows["r1"]["score"]
    assert rows["r1"]["sample"] is None
    assert [rows[each]["dropped_by"] for each in ("r0", "r1", "r2", "r3", "r4")] == [
        None, None, "saturated", "breaker, or tried before", "state",
    ]  # fmt: skip


def test_filters_of_the_strategy_are_named() -> None:
    step = _step(strategy="default")
    crowded = [candidate("r0", in_flight=200), candidate("r1", in_flight=0)]
    decision = DecisionLog().open(_record("x"), replace(step, considered=Seen(crowded)))
    (choice,) = render_decision(decision, wall_seconds=lambda moment: moment)["choices"]
    assert choice["candidates"][0]["dropped_by"] == "HotSpotGuard"
    assert "score" not in choice["candidates"][0]


def test_the_ring_is_bounded_by_number_and_by_bytes() -> None:
    log = DecisionLog(decisions_max=3, bytes_max=50_000)
    for number in range(5):
        log.open(_record(f"{number}"), _step())
    assert [log.find(f"{number}") is None for number in range(5)] == [True, True, False, False, False]
    log.open(_record("large"), _step(replace(request(), body=b" " * 40_000)))
    assert log.find("large") is not None
    assert log.size_bytes <= 50_000
    # A huge body would displace all others: it is not kept.
    huge = log.open(_record("huge"), _step(replace(request(), body=b" " * 300_000)))
    log.add(huge, _step(replace(request(), body=b" " * 300_000)))
    assert [each.context.body for each in huge.steps] == [b"", b""]
    assert log.find("large") is not None
    assert log.size_bytes <= 50_000


@pytest.mark.parametrize(
    ("attempts", "diverted", "cached", "candidates", "strategy", "expected"),
    [
        (1, True, 16, 2, "default", "retry"),
        (0, True, 16, 1, "default", "fallback"),
        (0, False, 16, 1, "default", "only-endpoint"),
        (0, False, 16, 2, "default", "prefix"),
        (0, False, 0, 2, "default", "least-cost"),
        (0, False, 0, 2, "round-robin", "round-robin"),
        (0, False, 0, 2, "prefix=3,load=1", "scores"),
    ],
)
def test_why_in_one_token(
    attempts: int, diverted: bool, cached: int, candidates: int, strategy: str, expected: str
) -> None:
    found = why_of(
        candidate("r", cached=cached),
        attempts=attempts,
        diverted=diverted,
        candidates=candidates,
        strategy=build_strategy(strategy),
    )
    assert found == expected


async def test_workers_ask_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.getpid", lambda: 1)
    one = Siblings(tmp_path, lambda request_id: b'{"of": 1}' if request_id == "mine" else b"")
    monkeypatch.setattr("os.getpid", lambda: 2)
    two = Siblings(tmp_path, lambda _: b"")
    tasks = [asyncio.create_task(each.serve(), name="siblings") for each in (one, two)]
    try:
        await eventually(lambda: len(_names(tmp_path)) == 2)
        assert await two.ask("mine") == b'{"of": 1}'
        assert await two.ask("nobody's") == b""
        # Only the others are asked, and never with what would be two questions.
        assert await one.ask("mine") == b""
        assert await two.ask("x\nmine") == b""
        assert await two.ask("m" * 1000) == b""
        assert await Siblings(None, lambda _: b"").ask("mine") == b""
    finally:
        await cancel_and_wait(*tasks)
    assert _names(tmp_path) == []


async def test_what_a_dead_worker_left_is_removed(tmp_path: Path) -> None:
    left = tmp_path / "decisions-9.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(left))
    assert await Siblings(tmp_path, lambda _: b"").ask("any") == b""
    assert _names(tmp_path) == []
