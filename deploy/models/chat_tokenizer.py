"""The tokenizer of millrace-tiny: a byte-level BPE with the ChatML turns as special tokens.

In come texts; out go a tokenizer that is trained in this process, and conversations as token
identifiers with a mask that says which of them the model has to learn. The pieces that are joined
here must agree with `CHAT_TEMPLATE`, which the engine applies when it serves; `agrees_with_template`
checks that. This module holds no model and draws no random numbers.
"""

from __future__ import annotations

from collections.abc import Iterable

from corpus import Turn
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
TURN_START = "<|im_start|>"
TURN_END = "<|im_end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ (message['content'] or '') | trim }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def train_tokenizer(
    texts: Iterable[str], *, vocabulary_size: int, max_length: int
) -> PreTrainedTokenizerFast:
    """Trains the byte-level BPE on the texts and wraps it with the chat template.

    Args:
        texts: What the merges are learned from.
        vocabulary_size: Tokens in all, the 256 bytes and three special tokens included.
        max_length: The context that is written into the tokenizer's configuration.

    Returns:
        A tokenizer that ends a turn with `<|im_end|>` and pads with `<|endoftext|>`.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=[END_OF_TEXT, TURN_START, TURN_END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=TURN_END,
        pad_token=END_OF_TEXT,
        additional_special_tokens=[TURN_START],
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


class ChatEncoder:
    """Turns conversations into token identifiers and a learning mask."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._tokenizer = tokenizer
        self._start = tokenizer.convert_tokens_to_ids(TURN_START)
        self._end = tokenizer.convert_tokens_to_ids(TURN_END)
        self._newline = self._pieces("\n")

    def encode(self, turns: list[Turn]) -> tuple[list[int], list[bool]]:
        """Encodes whole turns; only answers and their end marks are to be learned."""
        tokens: list[int] = []
        learned: list[bool] = []
        for role, content in turns:
            head = [self._start, *self._pieces(f"{role}\n")]
            body = [*self._pieces(content.strip()), self._end]
            tokens += [*head, *body, *self._newline]
            learned += [False] * len(head)
            learned += [role == "assistant"] * len(body)
            learned += [False] * len(self._newline)
        return tokens, learned

    def agrees_with_template(self, turns: list[Turn]) -> bool:
        """Tells whether the engine's chat template yields the same tokens as `encode`."""
        messages = [{"role": role, "content": content} for role, content in turns]
        text = self._tokenizer.apply_chat_template(messages, tokenize=False)
        return self._pieces(text) == self.encode(turns)[0]

    def _pieces(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False)
