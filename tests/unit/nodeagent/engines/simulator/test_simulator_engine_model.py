import itertools
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.block_hash import ROOT_HASH
from nodeagent.engines.simulator.engine_model import (
    EngineModel,
    Sequence,
    SequenceRequest,
    StepOutcome,
)
from nodeagent.engines.simulator.settings import EngineLimits, StepTiming


def request(prompt: list[int], output_tokens: int = 1, cache_salt: str | None = None) -> SequenceRequest:
    return SequenceRequest(prompt, output_tokens, "length", lambda index: index, cache_salt)


def limits(**changes: int) -> EngineLimits:
    values: dict[str, Any] = {
        "max_model_length_tokens": 512,
        "max_running_sequences": 8,
        "max_batched_tokens": 2048,
        "block_size_tokens": 16,
        "block_count": 65,
    }
    return EngineLimits(**{**values, **changes})


class Clock:
    """Drives a model through virtual time."""

    def __init__(self, model: EngineModel) -> None:
        self.model = model
        self.now_seconds = 0.0

    def step(self) -> StepOutcome:
        step = self.model.begin_step(self.now_seconds)
        assert step is not None
        self.now_seconds += step.duration_seconds
        return self.model.finish_step(step, self.now_seconds)

    def run(self, prompt: list[int], output_tokens: int = 1, salt: str | None = None) -> Sequence:
        sequence = self.model.submit(request(prompt, output_tokens, salt), self.now_seconds)
        while not sequence.finished:
            self.step()
        return sequence


def make(timing: StepTiming | None = None, **changes: int) -> Clock:
    return Clock(EngineModel(limits(**changes), timing or StepTiming()))


def test_hash_chain_starts_where_vllm_starts() -> None:
    assert ROOT_HASH.hex().startswith("066b1e89")
    assert ROOT_HASH.hex().endswith("d71198")


def test_first_token_takes_the_uncached_prompt_and_decoding_the_batch() -> None:
    timing = StepTiming(
        prefill_tokens_per_second=1000,
        inter_token_latency_ms=6,
        inter_token_latency_ms_per_sequence=0.5,
    )
    clock = make(timing)
    sequence = clock.model.submit(request(list(range(200)), 3), 0.0)
    twin = clock.model.submit(request(list(range(1000, 1100)), 3), 0.0)
    clock.step()
    assert sequence.first_token_seconds == pytest.approx(0.3)
    assert twin.first_token_seconds == pytest.approx(0.3)
    outcome = clock.step()
    assert [emission.gap_seconds for emission in outcome.emissions] == [
        pytest.approx(0.007),
        pytest.approx(0.007),
    ]


def test_a_long_prompt_is_computed_in_chunks_beside_the_batch() -> None:
    clock = make(max_batched_tokens=100)
    decoding = clock.model.submit(request([1, 2, 3], 50), 0.0)
    clock.step()
    clock.model.submit(request(list(range(100, 400)), 1), clock.now_seconds)
    step = clock.model.begin_step(clock.now_seconds)
    assert step is not None
    assert (step.decode_sequences, step.prefill_tokens) == (1, 99)
    assert decoding.emitted_tokens == 1


@pytest.mark.parametrize(
    ("prompt_tokens", "hit_tokens"), [(15, 0), (16, 0), (17, 16), (32, 16), (33, 32), (280, 272)]
)
def test_a_repeated_prompt_hits_whole_blocks_but_never_its_last_token(
    prompt_tokens: int, hit_tokens: int
) -> None:
    clock = make()
    prompt = list(range(prompt_tokens))
    assert clock.run(prompt).cached_tokens == 0
    assert clock.run(prompt).cached_tokens == hit_tokens
    counters = clock.model.counters
    assert counters.prefix_queries_tokens == 2 * prompt_tokens
    assert counters.prefix_hits_tokens == hit_tokens
    assert clock.model.pool.usage_fraction == 0.0


def test_generated_tokens_are_cached_for_the_next_turn() -> None:
    clock = make()
    clock.run([7] * 20, output_tokens=30)
    follow_up = [7] * 20 + list(range(29)) + [9, 9, 9]
    assert clock.run(follow_up).cached_tokens == 48


def test_salts_share_nothing() -> None:
    clock = make()
    clock.run([1] * 40, salt="a")
    assert clock.run([1] * 40, salt="b").cached_tokens == 0
    assert clock.run([1] * 40, salt="a").cached_tokens == 32


def test_least_recently_used_blocks_are_evicted_first() -> None:
    clock = make(block_count=9, max_model_length_tokens=128)
    old, used = [1] * 49, [2] * 49
    clock.run(old)
    clock.run(used)
    clock.run(used)
    clock.run([3] * 65)
    assert clock.run(used).cached_tokens == 48
    clock = make(block_count=9, max_model_length_tokens=128)
    clock.run(old)
    clock.run(used)
    clock.run(used)
    clock.run([3] * 65)
    assert clock.run(old).cached_tokens < 48


def test_the_batch_is_bounded_and_first_come_is_first_served() -> None:
    clock = make(max_running_sequences=2)
    sequences = [clock.model.submit(request([index] * 5, 2), 0.0) for index in range(5)]
    clock.step()
    assert [sequence.emitted_tokens for sequence in sequences] == [1, 1, 0, 0, 0]
    assert (clock.model.running_count, clock.model.waiting_count) == (2, 3)
    clock.step()
    clock.step()
    assert [sequence.emitted_tokens for sequence in sequences] == [2, 2, 1, 1, 0]


def test_what_does_not_fit_waits() -> None:
    clock = make(block_count=5, max_model_length_tokens=64)
    clock.model.submit(request(list(range(40)), 2), 0.0)
    blocked = clock.model.submit(request(list(range(100, 140)), 2), 0.0)
    clock.step()
    assert (clock.model.running_count, clock.model.waiting_count) == (1, 1)
    assert clock.model.pool.usage_fraction == 0.75
    clock.step()
    clock.step()
    assert blocked.emitted_tokens == 1


def test_a_growing_sequence_preempts_the_one_admitted_last() -> None:
    clock = make(block_count=5, max_model_length_tokens=64)
    first = clock.model.submit(request(list(range(30)), 30), 0.0)
    last = clock.model.submit(request(list(range(100, 130)), 30), 0.0)
    while clock.model.has_work():
        clock.step()
    assert (first.preemptions, last.preemptions) == (0, 1)
    assert (first.emitted_tokens, last.emitted_tokens) == (30, 30)
    assert clock.model.counters.preemptions == 1
    assert clock.model.counters.prefix_queries_tokens == 60


def test_an_abort_inside_a_step_frees_the_blocks_at_once() -> None:
    clock = make()
    sequence = clock.model.submit(request([1] * 100, 10), 0.0)
    step = clock.model.begin_step(0.0)
    assert step is not None
    assert clock.model.abort(sequence)
    assert clock.model.pool.held_blocks == 0
    assert clock.model.finish_step(step, 1.0).emissions == []
    assert not clock.model.abort(sequence)
    assert not clock.model.has_work()


@pytest.mark.parametrize(("prompt_tokens", "output_tokens"), [(0, 1), (1, 0), (512, 1), (1, 512)])
def test_impossible_requests_are_refused(prompt_tokens: int, output_tokens: int) -> None:
    with pytest.raises(ValueError, match="request"):
        make().model.submit(request([1] * prompt_tokens, output_tokens), 0.0)


class Invariants:
    """Steps a model and checks its bounds at every step."""

    def __init__(self, bounds: EngineLimits) -> None:
        self.bounds = bounds
        self.model = EngineModel(bounds, StepTiming())
        self.submitted: list[Sequence] = []
        self.now_seconds = 0.0

    def submit(self, prompt: list[int], output_tokens: int) -> None:
        wanted = request(prompt, output_tokens)
        self.submitted.append(self.model.submit(wanted, self.now_seconds))

    def step(self) -> None:
        model, pool, size = self.model, self.model.pool, self.bounds.block_size_tokens
        step = model.begin_step(self.now_seconds)
        if step is None:
            assert not model.has_work()
            return
        assert model.running_count <= self.bounds.max_running_sequences
        assert sum(tokens for _, tokens in step.scheduled) <= self.bounds.max_batched_tokens
        assert 0 <= pool.held_blocks <= pool.usable_blocks
        held = {id(block) for item in self.submitted for block in item.blocks}
        assert len(held) == pool.held_blocks
        for sequence, tokens in step.scheduled:
            assert len(sequence.blocks) * size >= sequence.computed_tokens + tokens
        self.now_seconds += step.duration_seconds
        model.finish_step(step, self.now_seconds)
        assert 0.0 <= pool.usage_fraction <= 1.0
        assert pool.cached_blocks <= pool.usable_blocks


numbers = st.integers(0, 23)
actions = st.lists(st.tuples(st.sampled_from(["submit", "step", "abort"]), numbers, numbers), max_size=40)


@settings(max_examples=150, deadline=None)
@given(
    actions=actions,
    block_size=st.integers(1, 5),
    extra_blocks=st.integers(0, 12),
    sequences=st.integers(1, 4),
    batched=st.integers(1, 30),
)
def test_blocks_and_batch_are_never_exceeded_and_everything_ends(
    actions: list[tuple[str, int, int]],
    block_size: int,
    extra_blocks: int,
    sequences: int,
    batched: int,
) -> None:
    world = Invariants(
        limits(
            max_model_length_tokens=48,
            block_size_tokens=block_size,
            block_count=1 + -(-48 // block_size) + extra_blocks,
            max_running_sequences=sequences,
            max_batched_tokens=batched,
        )
    )
    aborted: set[int] = set()
    for verb, first, second in actions:
        if verb == "submit":
            world.submit([first % 3] * (first + 1), second + 1)
        elif verb == "step":
            world.step()
        elif first < len(world.submitted) and world.model.abort(world.submitted[first]):
            aborted.add(first)
    for _ in itertools.repeat(None, 20_000):
        if not world.model.has_work():
            break
        world.step()
    assert not world.model.has_work()
    assert world.model.pool.held_blocks == 0
    for index, sequence in enumerate(world.submitted):
        if index not in aborted:
            assert sequence.emitted_tokens == sequence.request.output_tokens
