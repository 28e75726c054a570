"""The simulation itself, and on it what the default promises."""

import json
from pathlib import Path

import pytest

from nodeagent.engines.simulator.settings import StepTiming
from tests.bench.router_loads import (
    Load,
    ideal_hit_rate,
    multi_turn,
    one_prefix,
    random_prompts,
    read_trace,
    shared_prefix,
)
from tests.bench.router_trace import Result, Simulation, percentile


def _run(loads: list[Load], strategy: str, *, routers: int = 1) -> Result:
    simulation = Simulation(
        strategy=strategy, engines=4, blocks=2000, routers=routers, timing=StepTiming(11_000.0)
    )
    return simulation.run(loads)


def test_two_runs_are_equal() -> None:
    loads = multi_turn(limit=150, rate=20.0)
    first, second = (_run(loads, "default") for _ in range(2))
    assert first.first_token == second.first_token
    assert first.tokens_at == second.tokens_at
    assert len(first.end_to_end) == 150


def test_the_default_keeps_chats_together_and_balanced() -> None:
    loads = multi_turn(limit=400, rate=20.0, chats=40)
    ideal = ideal_hit_rate(loads)
    default, turns, least = (_run(loads, name) for name in ("default", "round-robin", "least-pending"))
    assert default.hit_rate > 0.93 * ideal
    assert default.hit_rate > 1.3 * max(turns.hit_rate, least.hit_rate)
    assert percentile(default.first_token, 0.9) < percentile(turns.first_token, 0.9)
    assert default.spread < 1.3


@pytest.mark.parametrize("strategy", ["default", "prefix-aware"])
def test_one_prefix_for_all_is_cached_and_spread(strategy: str) -> None:
    result = _run(one_prefix(limit=400, rate=40.0), strategy)
    assert result.hit_rate > 0.9
    assert result.spread < 1.3


def test_two_routers_lose_little() -> None:
    loads = shared_prefix(limit=400, rate=20.0, groups=12)
    one, two = (_run(loads, "default", routers=routers) for routers in (1, 2))
    assert two.hit_rate > 0.95 * one.hit_rate


def test_nothing_shared_is_nothing_hit() -> None:
    loads = random_prompts(limit=60, rate=20.0)
    assert ideal_hit_rate(loads) == 0
    assert _run(loads, "default").hit_rate == 0


def test_mooncake_traces_are_read_and_scaled(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    lines = [
        {"timestamp": 0, "input_length": 1000, "output_length": 80, "hash_ids": [1, 2]},
        {"timestamp": 0, "input_length": 1500, "output_length": 3, "hash_ids": [1, 2, 3]},
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    first, second = read_trace(path, limit=10, rate=1.0)
    assert (first.prompt_tokens, first.output_tokens) == (125, 10)
    assert (second.prompt_tokens, second.output_tokens) == (187, 1)
    # 128 tokens are two blocks; the trace does not say that the second one was cut.
    assert ideal_hit_rate([first, second]) == pytest.approx(128 / 312)
