"""The parts of the live benchmarks that compute: prompts, ideals, growth, the account of a fault."""

import pytest

from nodeagent.engines.simulator.tokenizer import encode
from tests.bench import router_faults, router_soak
from tests.bench.router_live.real_vllm import BLOCK_TOKENS, _chain
from tests.bench.router_live.replay import prompt_of
from tests.bench.router_loads import BLOCK_TOKENS as SIMULATED_BLOCK_TOKENS
from tests.bench.router_loads import GENERATORS, TRACE_BLOCK_TOKENS, Load
from tests.support.load import Outcome


@pytest.mark.parametrize("block", [0, 7, 42, 123, 9_999, 54_321, 123_456, 1_000_003])
def test_a_block_of_a_trace_is_64_tokens_of_the_simulator(block: int) -> None:
    assert len(encode(prompt_of(Load(0.0, [block, block], 2 * TRACE_BLOCK_TOKENS, 1)))) == 128


def test_prompts_have_the_length_that_the_load_names_and_differ_where_blocks_do() -> None:
    for load in GENERATORS["multi-turn"](limit=50, rate=10):
        assert len(encode(prompt_of(load))) == load.prompt_tokens
    one, other = (encode(prompt_of(Load(0.0, [5, last], 128, 1))) for last in (6, 7))
    assert one[:64] == other[:64]
    assert one[64 : 64 + SIMULATED_BLOCK_TOKENS] != other[64 : 64 + SIMULATED_BLOCK_TOKENS]


def test_a_chain_covers_whole_blocks_and_depends_on_all_before() -> None:
    tokens = list(range(3 * BLOCK_TOKENS + 5))
    assert len(_chain(tokens)) == 3
    assert _chain([99, *tokens[1:]])[2] != _chain(tokens)[2]
    assert _chain(tokens)[:2] == _chain(tokens[: 2 * BLOCK_TOKENS])


def test_growth_leaves_the_warm_up_out() -> None:
    growth, memory_bytes = router_soak._growth([10, 50] * 10 + [100] * 79 + [102])
    assert (growth, memory_bytes) == (0.0, 100)
    growth, _ = router_soak._growth([100] * 60 + list(range(100, 140)))
    assert growth > 0.3


def test_what_is_not_given_back_is_named() -> None:
    before = router_soak.Holdings(memory_bytes=100, sockets=2, tasks=20)
    after = router_soak.Holdings(memory_bytes=100, sockets=3, tasks=21)
    outcome = router_soak.Soak(
        rate=1,
        answers=1,
        events=1,
        failed=0,
        hung_up=0,
        growth=0.03,
        memory_bytes=1,
        before=before,
        after=after,
    )
    assert outcome.leaks == [
        "memory grew by 3.0%",
        "sockets: 2 before, 3 after",
        "tasks: 20 before, 21 after",
    ]


def test_failures_on_what_broke_are_counted_apart() -> None:
    outcomes = [
        Outcome(began=1, ended=3, status=0, endpoint="", error="under way when it broke"),
        Outcome(began=5, ended=6, status=200, endpoint=router_faults.BROKEN, error="cut off"),
        Outcome(began=5, ended=9, status=504, endpoint="", error='{"code":"upstream_timeout"}'),
        Outcome(began=5, ended=6, status=503, endpoint="chat-2", error="nobody's fault"),
        Outcome(began=5, ended=7, status=200, endpoint="chat-2"),
    ]
    assert router_faults._account(outcomes, moment=2) == ["5", "3", "1", "2.0 s"]
