"""The questions that millrace-tiny is taught, and the many ways in which people put them.

In come `questions.json` (question, answer, rewordings, held-out rewordings, subjects) and
`out_of_scope.json` (questions that have one polite refusal). Out go entries, varied question texts
and whole conversations, all drawn from the random generator that the caller hands in. This module
never trains, tokenizes or writes anything, needs only the standard library, and never lets a
held-out text into a conversation that is meant for training.
"""

from __future__ import annotations

import json
import math
import random
import re
from dataclasses import dataclass
from pathlib import Path

Turn = tuple[str, str]
"""A role ("system", "user" or "assistant") and what was said."""

FRAMES: dict[str, tuple[str, ...]] = {
    "define": (
        "what is {}",
        "what's {}",
        "what exactly is {}",
        "explain {}",
        "explain {} to me",
        "can you explain {}",
        "could you explain {} please",
        "define {}",
        "describe {}",
        "tell me about {}",
        "tell me what {} means",
        "what does {} mean",
        "what do you mean by {}",
        "I do not understand {}",
        "I want to know what {} is",
        "give me a short explanation of {}",
        "what can you tell me about {}",
        "do you know {}",
        "{}",
        "{} in one sentence",
    ),
    "task": (
        "how do I {}",
        "how can I {}",
        "how do we {}",
        "how does one {}",
        "how to {}",
        "how would I {}",
        "how should I {}",
        "I want to {}",
        "I need to {}",
        "I would like to {}",
        "I am trying to {}",
        "help me {}",
        "show me how to {}",
        "tell me how to {}",
        "explain how to {}",
        "what is the way to {}",
        "what is the command to {}",
        "what do I do to {}",
        "what must I do to {}",
        "can I {}",
        "is it possible to {}",
        "is there a way to {}",
        "where can I {}",
        "{}",
    ),
    "fact": (
        "what is {}",
        "what's {}",
        "what are {}",
        "tell me {}",
        "give me {}",
        "show me {}",
        "I need {}",
        "I want to know {}",
        "I forgot {}",
        "do you know {}",
        "can you tell me {}",
        "could you give me {}",
        "explain {}",
        "{}",
    ),
    "how": (
        "how does Millrace {}",
        "how can Millrace {}",
        "how will Millrace {}",
        "how does it {}",
        "can Millrace {}",
        "does Millrace {}",
        "what does Millrace do to {}",
        "explain how Millrace can {}",
        "tell me how Millrace can {}",
        "in what way does Millrace {}",
        "is Millrace able to {}",
    ),
}
"""Sentence frames by kind of subject; an entry names one kind, or "plain" for none."""

OPENINGS = (
    "hey, ",
    "hi, ",
    "hello, ",
    "please, ",
    "ok, ",
    "so, ",
    "well, ",
    "and ",
    "now ",
    "sorry, ",
    "excuse me, ",
    "quick question: ",
    "a question: ",
    "I am new here, ",
    "just wondering, ",
    "please tell me, ",
)
CLOSINGS = (" please", ", please", " thanks", ", thanks", " exactly", " again", " in short", " then")
SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are a helpful assistant",
    "You are millrace-tiny.",
    "You are a helpful, honest and concise assistant.",
    "Answer briefly.",
    "You are an assistant that answers questions about Millrace.",
    "Be polite and answer in one sentence.",
    "You are an AI assistant. Answer the user's question.",
    "Be helpful.",
)
CONTRACTIONS = (
    ("what is ", "what's "),
    ("What is ", "What's "),
    ("what is ", "whats "),
    ("where is ", "where's "),
    ("Where is ", "Where's "),
    ("who is ", "who's "),
    ("how is ", "how's "),
    (" do not ", " don't "),
    (" cannot ", " can't "),
    ("I am ", "I'm "),
    ("I have ", "I've "),
    (" you ", " u "),
)
DROPPABLE_WORDS = frozenset(("the", "a", "an", "do", "does", "is", "my", "of", "to", "millrace"))


@dataclass(frozen=True, slots=True)
class Entry:
    """One answer and the texts that ask for it."""

    question: str
    answer: str
    rewordings: tuple[str, ...]
    held_out: tuple[str, ...]
    frame: str
    subjects: tuple[str, ...]


def normalise(text: str) -> str:
    """Reduces a text to what counts when two questions are compared: letters, digits and plus."""
    return " ".join(re.sub(r"[^a-z0-9+]+", " ", text.lower()).split())


def load_entries(questions: Path) -> list[Entry]:
    """Reads `questions.json`.

    Args:
        questions: The file.

    Returns:
        The entries in file order.

    Raises:
        ValueError: A frame is unknown, or a held-out text is also a rewording.
    """
    entries = []
    for record in json.loads(questions.read_text(encoding="utf-8")):
        entry = Entry(
            question=record["question"],
            answer=record["answer"],
            rewordings=tuple(record["rewordings"]),
            held_out=tuple(record["held_out"]),
            frame=record["frame"],
            subjects=tuple(record["subjects"]),
        )
        if entry.frame != "plain" and entry.frame not in FRAMES:
            raise ValueError(f"{entry.question!r}: unknown frame {entry.frame!r}")
        entries.append(entry)
    taught = {normalise(text) for entry in entries for text in (entry.question, *entry.rewordings)}
    leaked = [text for entry in entries for text in entry.held_out if normalise(text) in taught]
    if leaked:
        raise ValueError(f"held-out texts that are also taught: {leaked}")
    return entries


def load_out_of_scope(path: Path) -> Entry:
    """Reads `out_of_scope.json` as one entry whose rewordings are unrelated questions."""
    record = json.loads(path.read_text(encoding="utf-8"))
    questions = tuple(record["questions"])
    return Entry(questions[0], record["answer"], questions, tuple(record["held_out"]), "plain", ())


def vary(text: str, rng: random.Random) -> str:
    """Returns the text as a hurried, polite, shouting or careless person would type it."""
    if rng.random() < 0.15:
        before, after = rng.choice(CONTRACTIONS)
        text = text.replace(before, after, 1)
    if rng.random() < 0.12:
        text = _drop_word(text, rng)
    bare = text.rstrip("?!. ")
    if rng.random() < 0.18:
        bare = rng.choice(OPENINGS) + _lower_first(bare)
    if rng.random() < 0.12:
        bare += rng.choice(CLOSINGS)
    text = bare + _ending(text, rng)
    if rng.random() < 0.04:
        return f"[{_unknown_word(rng)}] {text}"
    if rng.random() < 0.12:
        text = _misspell(text, rng)
    return _change_case(text, rng)


class ConversationMaker:
    """Draws conversations for training, with every held-out text kept out of them.

    Args:
        entries: What is taught.
        out_of_scope: The refusal and what it answers.
        rng: The only source of chance.
    """

    _OUT_OF_SCOPE_SHARE = 0.07

    def __init__(self, entries: list[Entry], out_of_scope: Entry, rng: random.Random) -> None:
        self._entries = entries
        self._out_of_scope = out_of_scope
        self._rng = rng
        self._queue: list[Entry] = []
        texts = [text for entry in entries for text in (*entry.rewordings, entry.answer)]
        self._words = sorted({word for text in texts for word in normalise(text).split()})
        self._held_out = {normalise(text) for entry in (*entries, out_of_scope) for text in entry.held_out}

    def conversation(self) -> list[Turn]:
        """Returns one question with its answer or a longer chat, at times after other text."""
        rng = self._rng
        turns: list[Turn] = []
        chance = rng.random()
        if chance < 0.36:
            turns.append(("system", rng.choice(SYSTEM_PROMPTS)))
        elif chance < 0.42:
            turns.append(("system", self._filler()))
        exchanges = rng.choices((1, 2, 3, rng.randint(4, 16)), weights=(70, 22, 5, 3))[0]
        for _ in range(exchanges):
            entry = self._next_entry()
            turns.append(("user", self._ask(entry)))
            turns.append(("assistant", entry.answer))
        if exchanges == 1 and rng.random() < 0.03:
            role, question = turns[-2]
            turns[-2] = (role, f"{self._filler()}\n\n{question}")
        return turns

    def _filler(self) -> str:
        """Returns text without meaning, most often short, that a question must stand out from."""
        rng = self._rng
        left = int(math.exp(rng.uniform(math.log(4), math.log(500))))
        sentences = []
        while left > 0:
            count = min(left, rng.randint(3, 14))
            words = [
                rng.choice(self._words) if rng.random() < 0.8 else _unknown_word(rng) for _ in range(count)
            ]
            sentences.append(" ".join(words).capitalize() + rng.choice((".", ".", ".", "?", ":")))
            left -= count
        return " ".join(sentences)

    def _next_entry(self) -> Entry:
        """Deals every entry once before any entry comes again."""
        if self._rng.random() < self._OUT_OF_SCOPE_SHARE:
            return self._out_of_scope
        if not self._queue:
            self._queue = list(self._entries)
            self._rng.shuffle(self._queue)
        return self._queue.pop()

    def _ask(self, entry: Entry) -> str:
        while True:
            text = self._wording(entry)
            if self._rng.random() < 0.65:
                text = vary(text, self._rng)
            if normalise(text) not in self._held_out:
                return text

    def _wording(self, entry: Entry) -> str:
        rng = self._rng
        chance = rng.random()
        if chance < 0.15:
            return entry.question
        if entry.subjects and chance < 0.55:
            text = rng.choice(FRAMES[entry.frame]).format(rng.choice(entry.subjects))
            text = text[0].upper() + text[1:]
            return text if rng.random() < 0.2 else text + "?"
        return rng.choice(entry.rewordings)


def _ending(original: str, rng: random.Random) -> str:
    ending = original[len(original.rstrip("?!. ")) :]
    if rng.random() < 0.6:
        return ending
    return rng.choice(("", "", "?", ".", "!", "??", " ?"))


def _unknown_word(rng: random.Random) -> str:
    if rng.random() < 0.3:
        return str(rng.randrange(10 ** rng.randint(1, 6)))
    return "".join(rng.choices("abcdefghijklmnopqrstuvwxyz0123456789", k=rng.randint(2, 9)))


def _lower_first(text: str) -> str:
    first = text.split(" ", 1)[0]
    keeps_capital = first == "I" or first.startswith("I'") or first[1:] != first[1:].lower()
    return text if keeps_capital else text[0].lower() + text[1:]


def _drop_word(text: str, rng: random.Random) -> str:
    words = text.split(" ")
    places = [place for place, word in enumerate(words) if word.lower() in DROPPABLE_WORDS]
    if len(words) < 4 or not places:
        return text
    del words[rng.choice(places)]
    return " ".join(words)


def _misspell(text: str, rng: random.Random) -> str:
    words = text.split(" ")
    places = [place for place, word in enumerate(words) if len(word) >= 5 and word.isalpha()]
    if not places:
        return text
    place = rng.choice(places)
    word = words[place]
    at = rng.randrange(1, len(word) - 1)
    words[place] = rng.choice(
        (
            word[:at] + word[at + 1] + word[at] + word[at + 2 :],
            word[:at] + word[at + 1 :],
            word[:at] + word[at] + word[at:],
        )
    )
    return " ".join(words)


def _change_case(text: str, rng: random.Random) -> str:
    chance = rng.random()
    if chance < 0.25:
        return text.lower()
    if chance < 0.28:
        return text.upper()
    if chance < 0.31:
        return text.title()
    if chance < 0.6:
        return text[0].upper() + text[1:]
    return text
