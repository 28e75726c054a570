"""The continuous-batching engine as a pure model: no clock, no event loop, no input or output.

In: requests (`submit`), aborts, and the passing of time as numbers given by the caller.
Out: a `Step` with the seconds it takes (`begin_step`) and what it brought (`finish_step`).
Every step first serves the running batch in order of admission (one token for a decoding
sequence, a chunk for one that is still in its prompt), then admits from the waiting queue, first
come first served, while sequences, batched tokens and KV blocks allow. A sequence that needs a
block when none is free preempts the one admitted last, which goes back to the head of the queue
and is computed again, minus what the prefix cache still holds.
Must not: exceed its blocks or sequences, read a clock, or keep finished requests.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from core.block_hash import ExtraKeys, block_hash, extra_keys
from nodeagent.engines.simulator.block_pool import Block, BlockPool
from nodeagent.engines.simulator.kv_journal import BlockRemoved, BlocksStored, CacheCleared, KvJournal
from nodeagent.engines.simulator.settings import EngineLimits, LoraAdapter, StepTiming


@dataclass(frozen=True)
class SequenceRequest:
    """What the engine is asked to generate.

    Attributes:
        prompt_token_ids: The prompt, at least one token.
        output_tokens: How many tokens to generate, at least one.
        finish_reason: What to report after the last one, `stop` or `length`.
        output_token_id: Gives the id of the output token at an index.
        cache_salt: Isolates the prefix cache, None shares it.
        max_tokens: The limit that the client asked for, None if it asked for none.
        lora: The adapter to use, None for the base model.
    """

    prompt_token_ids: list[int]
    output_tokens: int
    finish_reason: str
    output_token_id: Callable[[int], int]
    cache_salt: str | None = None
    max_tokens: int | None = None
    lora: LoraAdapter | None = None

    def extra_keys(self, *, first: bool) -> ExtraKeys | None:
        """What enters the hash of its first block, or of a later one, beside tokens."""
        lora = (self.lora.name, self.lora.path) if self.lora is not None else None
        return extra_keys(first=first, cache_salt=self.cache_salt, lora=lora)


@dataclass(eq=False)
class Sequence:
    """One request inside the engine; times are seconds on the caller's clock."""

    request: SequenceRequest
    arrival_seconds: float
    admitted_seconds: float | None = None
    first_token_seconds: float | None = None
    last_token_seconds: float | None = None
    computed_tokens: int = 0
    emitted_tokens: int = 0
    cached_tokens: int = 0
    preemptions: int = 0
    finished: bool = False
    blocks: list[Block] = field(default_factory=list)
    hashes: list[bytes] = field(default_factory=list)

    @property
    def known_tokens(self) -> int:
        """Prompt and output tokens so far."""
        return len(self.request.prompt_token_ids) + self.emitted_tokens

    def token_ids(self, start: int, stop: int) -> list[int]:
        """The ids at these positions of prompt and output."""
        prompt = self.request.prompt_token_ids
        ids = prompt[start:stop]
        for position in range(max(start, len(prompt)), stop):
            ids.append(self.request.output_token_id(position - len(prompt)))
        return ids


@dataclass
class Step:
    """One step under way: what it computes and how long that takes."""

    duration_seconds: float
    prefill_tokens: int
    decode_sequences: int
    scheduled: list[tuple[Sequence, int]]


@dataclass(frozen=True)
class Emission:
    """One token of one sequence; `gap_seconds` is the time since arrival or the token before."""

    sequence: Sequence
    gap_seconds: float
    is_first: bool


@dataclass(frozen=True)
class StepOutcome:
    """What a finished step brought."""

    emissions: list[Emission]
    finished: list[Sequence]
    computed_tokens: int


@dataclass
class EngineCounters:
    """Totals since the start that no outcome carries."""

    prefix_queries_tokens: int = 0
    prefix_hits_tokens: int = 0
    preemptions: int = 0


class EngineModel:
    """Waiting queue, running batch and KV blocks of one engine."""

    def __init__(self, limits: EngineLimits, timing: StepTiming) -> None:
        if limits.max_model_length_tokens > limits.capacity_tokens:
            raise ValueError("one request of the longest length must fit into the KV cache")
        self._limits = limits
        self._timing = timing
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []
        self.journal = KvJournal(enabled=limits.kv_events and limits.prefix_caching)
        self.pool = BlockPool(limits.block_count, lambda digest: self.journal.add(BlockRemoved(digest)))
        self.counters = EngineCounters()

    @property
    def running_count(self) -> int:
        """Sequences in the batch."""
        return len(self._running)

    @property
    def waiting_count(self) -> int:
        """Sequences in the queue."""
        return len(self._waiting)

    @property
    def deferred_count(self) -> int:
        """Sequences in the queue whose adapter has no place in the batch."""
        running = self._running_adapters()
        return sum(1 for sequence in self._waiting if not self._adapter_fits(sequence, running))

    @property
    def unprocessed_prompt_tokens(self) -> int:
        """Prompt tokens of requests without a first token; vLLM counts each prompt whole."""
        sequences = (*self._running, *self._waiting)
        return sum(len(each.request.prompt_token_ids) for each in sequences if not each.emitted_tokens)

    def adapters(self) -> tuple[set[str], set[str]]:
        """Names of the adapters that run, and of those that wait."""
        waiting = {each.request.lora.name for each in self._waiting if each.request.lora is not None}
        return self._running_adapters(), waiting

    def clear_cache(self) -> bool:
        """Forgets all cached blocks, as `/reset_prefix_cache`; False while a sequence holds some."""
        cleared = self.pool.clear()
        if cleared:
            self.journal.add(CacheCleared())
        return cleared

    def _running_adapters(self) -> set[str]:
        return {each.request.lora.name for each in self._running if each.request.lora is not None}

    def _adapter_fits(self, sequence: Sequence, running: set[str]) -> bool:
        lora = sequence.request.lora
        return lora is None or lora.name in running or len(running) < self._limits.max_running_adapters

    def has_work(self) -> bool:
        """Whether another step is needed."""
        return bool(self._running or self._waiting)

    def submit(self, request: SequenceRequest, now_seconds: float) -> Sequence:
        """Queues a request.

        Raises:
            ValueError: It is empty or longer than the model's length.
        """
        total = len(request.prompt_token_ids) + request.output_tokens
        if not request.prompt_token_ids or request.output_tokens < 1:
            raise ValueError("a request needs a prompt token and an output token")
        if total > self._limits.max_model_length_tokens:
            raise ValueError("a request must fit into the model's length")
        sequence = Sequence(request, now_seconds)
        self._waiting.append(sequence)
        return sequence

    def abort(self, sequence: Sequence) -> bool:
        """Forgets a sequence at once; False if it had already ended."""
        if sequence.finished:
            return False
        if sequence in self._running:
            self._running.remove(sequence)
        else:
            self._waiting.remove(sequence)
        self._end(sequence)
        return True

    def begin_step(self, now_seconds: float) -> Step | None:
        """Schedules the next step; None without work."""
        budget = self._limits.max_batched_tokens
        scheduled: list[tuple[Sequence, int]] = []
        preempted = False
        index = 0
        while index < len(self._running) and budget:
            sequence = self._running[index]
            tokens = min(sequence.known_tokens - sequence.computed_tokens, budget)
            fits, victims = self._grow(sequence, tokens)
            preempted = preempted or victims
            if not fits:
                break
            scheduled.append((sequence, tokens))
            budget -= tokens
            index += 1
        if not preempted:
            self._admit(scheduled, budget, now_seconds)
        if not scheduled:
            return None
        return self._make_step(scheduled)

    def finish_step(self, step: Step, now_seconds: float) -> StepOutcome:
        """Brings the tokens of a step whose time has passed; aborted sequences bring none."""
        emissions: list[Emission] = []
        finished: list[Sequence] = []
        computed_tokens = 0
        for sequence, tokens in step.scheduled:
            if sequence.finished:
                continue
            sequence.computed_tokens += tokens
            computed_tokens += tokens
            if sequence.computed_tokens < sequence.known_tokens:
                continue
            emissions.append(self._emit(sequence, now_seconds))
            if sequence.emitted_tokens == sequence.request.output_tokens:
                self._running.remove(sequence)
                self._end(sequence)
                finished.append(sequence)
        return StepOutcome(emissions, finished, computed_tokens)

    def _emit(self, sequence: Sequence, now_seconds: float) -> Emission:
        is_first = sequence.first_token_seconds is None
        before = sequence.last_token_seconds
        since = sequence.arrival_seconds if before is None else before
        if is_first:
            sequence.first_token_seconds = now_seconds
        sequence.last_token_seconds = now_seconds
        sequence.emitted_tokens += 1
        return Emission(sequence, now_seconds - since, is_first)

    def _make_step(self, scheduled: list[tuple[Sequence, int]]) -> Step:
        prefill_tokens = 0
        decode_sequences = 0
        for sequence, tokens in scheduled:
            prompt_tokens = len(sequence.request.prompt_token_ids)
            if tokens == 1 and sequence.computed_tokens >= prompt_tokens:
                decode_sequences += 1
            else:
                prefill_tokens += tokens
        duration = self._timing.step_seconds(prefill_tokens, decode_sequences)
        return Step(duration, prefill_tokens, decode_sequences, scheduled)

    def _blocks_for(self, tokens: int) -> int:
        return -(-tokens // self._limits.block_size_tokens)

    def _grow(self, sequence: Sequence, tokens: int) -> tuple[bool, bool]:
        """Gives a running sequence its blocks; says whether it has them and if others lost."""
        fresh = self._blocks_for(sequence.computed_tokens + tokens) - len(sequence.blocks)
        victims = False
        while fresh > 0:
            taken = self.pool.hold((), fresh)
            if taken is not None:
                sequence.blocks += taken
                break
            victims = True
            victim = self._running.pop()
            self._preempt(victim)
            if victim is sequence:
                return False, True
        self._seal(sequence, sequence.computed_tokens + tokens)
        return True, victims

    def _preempt(self, victim: Sequence) -> None:
        self.pool.release(victim.blocks)
        victim.blocks = []
        victim.computed_tokens = 0
        victim.preemptions += 1
        self.counters.preemptions += 1
        self._waiting.appendleft(victim)

    def _admit(self, scheduled: list[tuple[Sequence, int]], budget: int, now_seconds: float) -> None:
        adapters = self._running_adapters()
        index = 0
        while index < len(self._waiting) and budget:
            if len(self._running) >= self._limits.max_running_sequences:
                return
            sequence = self._waiting[index]
            if not self._adapter_fits(sequence, adapters):
                index += 1
                continue
            hits = self._hits(sequence)
            hit_tokens = len(hits) * self._limits.block_size_tokens
            whole = self._blocks_for(sequence.known_tokens) - len(hits)
            # The whole prompt must fit before its first chunk starts, or two half-computed
            # prompts could hold all blocks and wait for each other.
            if not self.pool.can_hold(hits, whole):
                return
            tokens = min(sequence.known_tokens - hit_tokens, budget)
            fresh = self._blocks_for(hit_tokens + tokens) - len(hits)
            taken = self.pool.hold(hits, fresh)
            if taken is None:
                return
            del self._waiting[index]
            self._running.append(sequence)
            if sequence.request.lora is not None:
                adapters.add(sequence.request.lora.name)
            sequence.blocks = taken
            sequence.computed_tokens = hit_tokens
            if sequence.admitted_seconds is None:
                sequence.admitted_seconds = now_seconds
                sequence.cached_tokens = hit_tokens
                self.counters.prefix_queries_tokens += sequence.known_tokens
                self.counters.prefix_hits_tokens += hit_tokens
            self._seal(sequence, hit_tokens + tokens)
            scheduled.append((sequence, tokens))
            budget -= tokens

    def _hits(self, sequence: Sequence) -> list[Block]:
        """Cached blocks of the prefix; the last token is always computed, so n-1 can hit."""
        if not self._limits.prefix_caching:
            return []
        full_blocks = (sequence.known_tokens - 1) // self._limits.block_size_tokens
        self._extend_hashes(sequence, full_blocks)
        return self.pool.match(sequence.hashes[:full_blocks])

    def _seal(self, sequence: Sequence, tokens: int) -> None:
        """Caches the blocks that are full once this step's tokens are computed."""
        if not self._limits.prefix_caching:
            return
        size = self._limits.block_size_tokens
        full_blocks = tokens // size
        first = sequence.computed_tokens // size
        self._extend_hashes(sequence, full_blocks)
        fresh: list[int] = []
        for index in range(first, full_blocks):
            if self.pool.seal(sequence.blocks[index], sequence.hashes[index]):
                fresh.append(index)
            elif fresh:
                self._note_stored(sequence, fresh)
                fresh = []
        if fresh:
            self._note_stored(sequence, fresh)

    def _note_stored(self, sequence: Sequence, fresh: list[int]) -> None:
        """Writes down that consecutive blocks of a sequence are cached now."""
        if not self.journal.enabled:
            return
        size = self._limits.block_size_tokens
        start, stop = fresh[0], fresh[-1] + 1
        lora = sequence.request.lora
        self.journal.add(
            BlocksStored(
                digests=sequence.hashes[start:stop],
                parent=sequence.hashes[start - 1] if start else None,
                token_ids=sequence.token_ids(start * size, stop * size),
                block_size_tokens=size,
                lora_id=lora.number if lora is not None else None,
                lora_name=lora.name if lora is not None else None,
                extra_keys=[sequence.request.extra_keys(first=index == 0) for index in fresh],
            )
        )

    def _extend_hashes(self, sequence: Sequence, full_blocks: int) -> None:
        size = self._limits.block_size_tokens
        while len(sequence.hashes) < full_blocks:
            start = len(sequence.hashes) * size
            parent = sequence.hashes[-1] if sequence.hashes else None
            token_ids = sequence.token_ids(start, start + size)
            extra = sequence.request.extra_keys(first=start == 0)
            sequence.hashes.append(block_hash(parent, token_ids, extra))

    def _end(self, sequence: Sequence) -> None:
        sequence.finished = True
        self.pool.release(sequence.blocks)
        sequence.blocks = []
