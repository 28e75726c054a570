"""Chats on small caches in virtual time: `router_live.real_vllm` without vLLM, for many seeds in seconds.

    python -m tests.bench.router_chats [--seeds 6] [--chats 120] [--slowness 1 2 4] [--strategies A B]

Some clients hold chats that share system prompts; a turn sends the whole chat so far and waits for its answer
(a closed loop). Text, counts, engines and cache sizes are those of `real_vllm`; two bytes are a token, as the
bundled model's tokenizer cuts them, which a router does not know. Real engines that share two cores are not
equally fast from one moment to the next; `--slowness 1 2 4` makes the second and third slower. Out goes a
Markdown table: the hit rate of every seed, and what an endless cache would have hit.
"""

import argparse
import random
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from nodeagent.engines.simulator.settings import StepTiming
from tests.bench.router_live.real_vllm import (
    ANSWER_TOKENS,
    AT_ONCE,
    BLOCK_TOKENS,
    BLOCKS,
    ENGINES,
    TURNS,
    USER_WORDS,
    make_chats,
    random_text,
)
from tests.bench.router_loads import SEED, Load
from tests.bench.router_trace import Simulation

BYTES_PER_TOKEN = 2
# About what three engines on two cores compute.
PREFILL_TOKENS_PER_SECOND, INTER_TOKEN_LATENCY_MS = 3000.0, 10.0
STRATEGIES = ("round-robin", "least-pending", "prefix-aware", "published-cache-aware", "default")


@dataclass
class _Chat:
    """A conversation, and the clients that wait for its turn."""

    messages: list[dict[str, str]]
    tokens: list[int] = field(default_factory=list)
    busy: bool = False
    waiting: int = 0

    def add(self, role: str, text: str) -> list[int]:
        """Adds a message and returns its tokens."""
        self.messages.append({"role": role, "content": text})
        added = tokens_of(role) + tokens_of(text)
        self.tokens += added
        return added


def tokens_of(text: str) -> list[int]:
    """Cuts a text of ASCII, two characters a token."""
    return [int.from_bytes(text[at : at + 2].encode(), "big") for at in range(0, len(text), BYTES_PER_TOKEN)]


class ChatSimulation(Simulation):
    """Clients, a router and engines; out come the figures of a `Result` and the ideal hit rate."""

    def __init__(
        self,
        *,
        strategy: str,
        seed: int,
        routers: int = 1,
        slowness: Sequence[float] = (1.0,) * ENGINES,
    ) -> None:
        """Takes how much slower than the fastest each engine is."""
        super().__init__(
            strategy=strategy,
            engines=ENGINES,
            blocks=BLOCKS,
            routers=routers,
            timing=[
                StepTiming(
                    prefill_tokens_per_second=PREFILL_TOKENS_PER_SECOND / each,
                    inter_token_latency_ms=INTER_TOKEN_LATENCY_MS * each,
                )
                for each in slowness
            ],
            block_tokens=BLOCK_TOKENS,
            seed=seed,
        )
        self._random = random.Random(seed)
        self._chats: list[_Chat] = []
        self._turns: Iterator[int] = iter(())
        self._seen: set[int] = set()
        self._hit = self._total = self._number = 0
        self._of_load: dict[int, _Chat] = {}

    @property
    def ideal_hit_rate(self) -> float:
        """What one endless cache of whole blocks would have hit."""
        return self._hit / self._total

    def chats(self, count: int) -> list[Load]:
        """Makes the chats; returns a place for each turn, of which only the number counts."""
        for chat in make_chats(count, seed=self._seed):
            made = _Chat([])
            made.add("system", chat.messages[0]["content"])
            self._chats.append(made)
        order = [at for at in range(count) for _ in range(TURNS)]
        self._random.shuffle(order)
        self._turns = iter(order)
        return [Load(0.0, (), 0, 0)] * len(order)

    def _begin(self, requests: Sequence[Load]) -> None:
        for client in range(AT_ONCE):
            self._at(0.001 * client, self._next)

    def _next(self) -> None:
        """A client takes the next turn; of a chat whose turn is under way it waits for the end."""
        at = next(self._turns, None)
        if at is None:
            return
        chat = self._chats[at]
        if chat.busy:
            chat.waiting += 1
        else:
            self._turn(chat)

    def _turn(self, chat: _Chat) -> None:
        chat.busy = True
        chat.add("user", random_text(self._random, USER_WORDS))
        prompt = [*chat.tokens, *tokens_of("assistant")]
        answer = random_text(self._random, ANSWER_TOKENS)[: BYTES_PER_TOKEN * ANSWER_TOKENS]
        load = Load(self._clock.seconds, (), len(prompt), ANSWER_TOKENS)
        document = {"messages": list(chat.messages)}
        output = tokens_of(answer)
        chat.add("assistant", answer)
        self._count_ideal(prompt, chat.tokens)
        self._number += 1
        self._of_load[id(load)] = chat
        self._send(
            self._number,
            load,
            self._random.choice(self._routers),
            document=document,
            tokens=prompt,
            output_token=output.__getitem__,
        )

    def _ended(self, load: Load) -> None:
        chat = self._of_load.pop(id(load))
        chat.busy = False
        if chat.waiting:
            chat.waiting -= 1
            self._turn(chat)
        self._next()

    def _count_ideal(self, prompt: Sequence[int], whole: Sequence[int]) -> None:
        for block in _chain(prompt)[: (len(prompt) - 1) // BLOCK_TOKENS]:
            if block not in self._seen:
                break
            self._hit += BLOCK_TOKENS
        self._total += len(prompt)
        # The last token of an answer is never computed.
        self._seen.update(_chain(whole[:-1]))


def _chain(tokens: Sequence[int]) -> list[int]:
    chain, before = [], 0
    for end in range(BLOCK_TOKENS, len(tokens) + 1, BLOCK_TOKENS):
        before = hash((before, *tokens[end - BLOCK_TOKENS : end]))
        chain.append(before)
    return chain


def main() -> None:
    """Runs every strategy on the same chats and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--seeds", type=int, default=6, help="how many; the first is that of the live benchmark"
    )
    parser.add_argument("--slowness", type=float, nargs=ENGINES, default=(1.0,) * ENGINES)
    parser.add_argument("--chats", type=int, default=120)
    parser.add_argument("--routers", type=int, default=1)
    parser.add_argument("--strategies", nargs="+", default=STRATEGIES, help="as the router takes them")
    options = parser.parse_args()
    print(
        f"\n{options.chats} chats of {TURNS} turns, {AT_ONCE} at a time, {ENGINES} engines of {BLOCKS} "
        f"blocks of {BLOCK_TOKENS} tokens, slowness {options.slowness}, {options.routers} router(s), "
        f"{options.seeds} seeds\n"
    )
    print("| strategy | hit rate, mean | each seed | ideal | spread |")
    print("|---|---|---|---|---|")
    for strategy in options.strategies:
        rates, ideals, spreads = [], [], []
        for seed in range(SEED, SEED + options.seeds):
            simulation = ChatSimulation(
                strategy=strategy, seed=seed, routers=options.routers, slowness=options.slowness
            )
            result = simulation.run(simulation.chats(options.chats))
            rates.append(result.hit_rate)
            ideals.append(simulation.ideal_hit_rate)
            spreads.append(result.spread)
        print(
            f"| {strategy} | {statistics.mean(rates):.3f} | {', '.join(f'{each:.3f}' for each in rates)} "
            f"| {statistics.mean(ideals):.3f} | {', '.join(f'{each:.2f}' for each in spreads)} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
