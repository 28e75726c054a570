"""Trains millrace-tiny from scratch and writes it as a checkpoint that vLLM can serve.

In come `questions.json` and `out_of_scope.json` beside this file; out goes a directory with the
configuration, the bfloat16 weights and the tokenizer. The run is decided by `--seed` alone, on
two CPU threads by default, and needs no network. It never writes a checkpoint whose greedy answers
to the canonical questions, taken from the rounded bfloat16 weights, are not all exact.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from chat_tokenizer import ChatEncoder, train_tokenizer
from corpus import (
    SYSTEM_PROMPTS,
    ConversationMaker,
    Entry,
    Turn,
    load_entries,
    load_out_of_scope,
)
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

HERE = Path(__file__).resolve().parent
VOCABULARY_SIZE = 1024
CONTEXT_TOKENS = 2048
HEAD_DIMENSION = 64  # vLLM's attention for CPUs takes 64, and fails on 16 at the first request
SIZE_BYTES_MAX = 8_000_000
WARM_UP_STEPS = 60
REPORT_EVERY_STEPS = 50
IGNORED = -100  # the label that the loss leaves out


@dataclass(frozen=True, slots=True)
class Case:
    """A conversation that ends with a question, and the answer that is due."""

    turns: tuple[Turn, ...]
    answer: str


@dataclass(frozen=True, slots=True)
class Score:
    """How many answers were exact, what was missed, and the narrowest lead of a right token."""

    exact: int
    total: int
    missed: tuple[Case, ...]
    margin_min: float

    @property
    def share(self) -> float:
        """The exact answers as a share of all."""
        return self.exact / self.total


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Builds the untrained Llama with heads of 64 dimensions and tied embeddings."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=640,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=HEAD_DIMENSION,
        max_position_embeddings=CONTEXT_TOKENS,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def tokenizer_texts(entries: list[Entry], out_of_scope: Entry, seed: int) -> Iterator[str]:
    """Yields the texts whose words should become tokens, answers more often than chance words."""
    for entry in entries:
        for _ in range(8):
            yield entry.answer
    maker = ConversationMaker(entries, out_of_scope, random.Random(seed))  # noqa: S311 not a secret
    for _ in range(6000):
        for role, content in maker.conversation():
            if role == "user":
                yield content
    for prompt in SYSTEM_PROMPTS:
        for _ in range(20):
            yield prompt


def padded(encoded: list[tuple[list[int], list[bool]]], pad_token: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Pads on the right, where causal attention needs no mask, and returns tokens and labels."""
    longest = max(len(tokens) for tokens, _ in encoded)
    inputs = torch.full((len(encoded), longest), pad_token)
    labels = torch.full((len(encoded), longest), IGNORED)
    for row, (tokens, learned) in enumerate(encoded):
        inputs[row, : len(tokens)] = torch.tensor(tokens)
        labels[row, : len(tokens)] = torch.where(
            torch.tensor(learned), torch.tensor(tokens), torch.tensor(IGNORED)
        )
    return inputs, labels


def batches(
    maker: ConversationMaker, encoder: ChatEncoder, *, tokens_max: int, pad_token: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yields endless batches of at most `tokens_max` tokens, padding included.

    Conversations of similar length share a batch, so that little is padding, and a step costs the
    same whether it sees many short conversations or a few long ones.
    """
    while True:
        pool = [encoder.encode(maker.conversation()) for _ in range(512)]
        pool = [item for item in pool if len(item[0]) <= CONTEXT_TOKENS]
        pool.sort(key=lambda item: len(item[0]))
        groups: list[list[tuple[list[int], list[bool]]]] = [[]]
        for item in pool:
            if groups[-1] and len(item[0]) * (len(groups[-1]) + 1) > tokens_max:
                groups.append([])
            groups[-1].append(item)
        for index in torch.randperm(len(groups)).tolist():
            yield padded(groups[index], pad_token)


def optimiser(model: LlamaForCausalLM, peak_rate: float) -> torch.optim.AdamW:
    """Returns AdamW with weight decay on matrices only."""
    matrices = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": 0.1},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=peak_rate, betas=(0.9, 0.98), foreach=True)


def rate_factor(step: int, steps: int) -> float:
    """Returns the share of the peak learning rate: a linear rise, then a cosine to zero."""
    if step < WARM_UP_STEPS:
        return (step + 1) / WARM_UP_STEPS
    progress = (step - WARM_UP_STEPS) / max(1, steps - WARM_UP_STEPS)
    return 0.5 * (1.0 + math.cos(math.pi * progress))


def train(
    model: LlamaForCausalLM,
    stream: Iterator[tuple[torch.Tensor, torch.Tensor]],
    *,
    steps: int,
    peak_rate: float,
) -> None:
    """Trains in place, with the loss on answers only.

    Args:
        model: The model, in float32; the forward pass runs under bfloat16 autocast.
        stream: Batches of tokens and labels.
        steps: How many batches to take.
        peak_rate: The highest learning rate.
    """
    adam = optimiser(model, peak_rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(adam, lambda step: rate_factor(step, steps))
    started = time.monotonic()
    model.train()
    for step in range(1, steps + 1):
        inputs, labels = next(stream)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            hidden = model.model(input_ids=inputs, use_cache=False).last_hidden_state
            wanted = labels[:, 1:] != IGNORED
            logits = model.lm_head(hidden[:, :-1][wanted])
        loss = functional.cross_entropy(logits.float(), labels[:, 1:][wanted])
        adam.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.step()
        schedule.step()
        if step % REPORT_EVERY_STEPS == 0 or step == steps:
            elapsed = time.monotonic() - started
            print(f"step {step}/{steps}  loss {loss.item():.4f}  {elapsed:.0f} s", flush=True)


@torch.inference_mode()
def score(model: LlamaForCausalLM, encoder: ChatEncoder, cases: list[Case]) -> Score:
    """Counts the cases whose greedy answer is exact.

    The answer is fed in, and every one of its tokens has to be the most likely one; that holds
    exactly if greedy decoding yields it. The margin is taken over exact answers only.
    """
    model.eval()
    missed: list[Case] = []
    margin_min = math.inf
    for start in range(0, len(cases), 64):
        group = cases[start : start + 64]
        inputs, labels = padded(
            [_last_answer_only(encoder, case) for case in group], model.config.pad_token_id
        )
        leaders = model(input_ids=inputs, use_cache=False).logits[:, :-1].float().topk(2, dim=-1)
        targets = labels[:, 1:]
        right = (leaders.indices[..., 0] == targets) | (targets == IGNORED)
        leads = leaders.values[..., 0] - leaders.values[..., 1]
        leads = leads.masked_fill(targets == IGNORED, math.inf).amin(dim=1)
        for case, exact, lead in zip(group, right.all(dim=1).tolist(), leads.tolist(), strict=True):
            if exact:
                margin_min = min(margin_min, lead)
            else:
                missed.append(case)
    return Score(len(cases) - len(missed), len(cases), tuple(missed), margin_min)


def _last_answer_only(encoder: ChatEncoder, case: Case) -> tuple[list[int], list[bool]]:
    before, _ = encoder.encode(list(case.turns))
    tokens, learned = encoder.encode([*case.turns, ("assistant", case.answer)])
    return tokens, [learn and place >= len(before) for place, learn in enumerate(learned)]


def canonical_cases(entries: list[Entry]) -> dict[str, list[Case]]:
    """Returns every canonical question bare, after each system prompt, and as a second turn."""
    bare = [Case((("user", entry.question),), entry.answer) for entry in entries]
    prompted = [
        Case((("system", prompt), *case.turns), case.answer) for case in bare for prompt in SYSTEM_PROMPTS
    ]
    second = [
        Case(
            (*first.turns, ("assistant", first.answer), *case.turns),
            case.answer,
        )
        for first, case in zip(bare[-1:] + bare[:-1], bare, strict=True)
    ]
    return {"canonical": bare, "with system prompt": prompted, "second turn": second}


def reworded_cases(entries: list[Entry], out_of_scope: Entry) -> dict[str, list[Case]]:
    """Returns the taught rewordings, the held-out ones, and held-out unrelated questions."""

    def cases(pairs: Iterator[tuple[str, str]]) -> list[Case]:
        return [Case((("user", text),), answer) for text, answer in pairs]

    return {
        "rewordings": cases((text, e.answer) for e in entries for text in e.rewordings),
        "held out": cases((text, e.answer) for e in entries for text in e.held_out),
        "held out, lower case, no mark": cases(
            (text.lower().rstrip("?!."), e.answer) for e in entries for text in e.held_out
        ),
        "out of scope, held out": cases((text, out_of_scope.answer) for text in out_of_scope.held_out),
    }


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, output: Path) -> None:
    """Writes the checkpoint, and generation defaults that are as good as greedy."""
    output.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(output)
    # The weights are written for their owner alone, but an engine may run as another user.
    (output / "model.safetensors").chmod(0o644)
    tokenizer.save_pretrained(output)
    generation = {
        "do_sample": True,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "temperature": 0.01,
    }
    (output / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    special = {
        "eos_token": tokenizer.eos_token,
        "pad_token": tokenizer.pad_token,
        "additional_special_tokens": ["<|im_start|>"],
    }
    (output / "special_tokens_map.json").write_text(json.dumps(special, indent=2) + "\n")


def report(scores: dict[str, Score]) -> None:
    """Prints one line a set, and the questions that were missed."""
    for name, result in scores.items():
        print(
            f"{name:32} {result.exact:4}/{result.total:<4} {result.share:7.1%}"
            f"  narrowest lead {result.margin_min:.2f}"
        )
    for name, result in scores.items():
        for case in result.missed[:40]:
            print(f"  missed ({name}): {case.turns[-1][1]}")


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description="Train millrace-tiny from scratch.")
    parser.add_argument("--output", type=Path, default=HERE / "millrace-tiny")
    parser.add_argument("--seed", type=int, default=7600)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch-tokens", type=int, default=6144, help="tokens a step")
    parser.add_argument("--peak-rate", type=float, default=2e-3)
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


def main() -> int:
    """Trains, evaluates in bfloat16 and saves; returns 1 and saves nothing if answers are wrong."""
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    entries = load_entries(HERE / "questions.json")
    out_of_scope = load_out_of_scope(HERE / "out_of_scope.json")
    tokenizer = train_tokenizer(
        tokenizer_texts(entries, out_of_scope, arguments.seed + 1),
        vocabulary_size=VOCABULARY_SIZE,
        max_length=CONTEXT_TOKENS,
    )
    encoder = ChatEncoder(tokenizer)
    model = build_model(tokenizer)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{len(entries)} answers, {len(tokenizer)} tokens, {parameters} parameters", flush=True)
    maker = ConversationMaker(entries, out_of_scope, random.Random(arguments.seed))  # noqa: S311
    if not all(encoder.agrees_with_template(maker.conversation()) for _ in range(500)):
        raise RuntimeError("the encoder and the chat template disagree")
    stream = batches(maker, encoder, tokens_max=arguments.batch_tokens, pad_token=tokenizer.pad_token_id)
    train(model, stream, steps=arguments.steps, peak_rate=arguments.peak_rate)

    model.to(torch.bfloat16)
    sets = {**canonical_cases(entries), **reworded_cases(entries, out_of_scope)}
    scores = {name: score(model, encoder, cases) for name, cases in sets.items()}
    report(scores)
    if scores["canonical"].missed:
        print("not saved: a canonical answer is wrong", file=sys.stderr)
        return 1
    save(model, tokenizer, arguments.output)
    size = (arguments.output / "model.safetensors").stat().st_size
    print(f"saved to {arguments.output.name}: {size} bytes of weights")
    return 0 if size <= SIZE_BYTES_MAX else 1


if __name__ == "__main__":
    sys.exit(main())
