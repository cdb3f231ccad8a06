"""What a task makes: a conversation that ends with a question, its thinking and its answer.

These are values only.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

HELD_OUT_SHARE = 10
# The demonstrations use these words, so training must not include them.
HELD_OUT_WORDS = ("strawberry", "raspberry")


@dataclass(frozen=True, slots=True)
class Message:
    """One turn: `role` is system, user or assistant."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Conversation:
    """A conversation that ends with a question, and the reply to it.

    `result` is the content of `\\boxed{}` in the answer, or the whole answer if nothing is boxed.
    """

    task: str
    messages: tuple[Message, ...]
    thinking: str
    answer: str
    result: str


@dataclass(frozen=True, slots=True)
class Setting:
    """How hard a case may be (0 easiest, 1 all of the task) and on which side of the hold-out."""

    difficulty: float = 1.0
    held_out: bool = False

    def at_most(self, least: int, most: int) -> int:
        """The largest size allowed, between `least` and `most` by difficulty."""
        return least + round((most - least) * self.difficulty)

    def accepts(self, key: str) -> bool:
        """Whether a case known by `key` is on the wanted side of the hold-out."""
        return is_held_out(key) == self.held_out


def is_held_out(key: str) -> bool:
    """Whether training never sees `key` (a word, or the numbers of a question)."""
    return key in HELD_OUT_WORDS or zlib.crc32(key.encode()) % HELD_OUT_SHARE == 0


def boxed(text: str) -> str | None:
    """The content of the last `\\boxed{}` in `text`, or None."""
    start = text.rfind("\\boxed{")
    end = text.find("}", start)
    return text[start + len("\\boxed{") : end] if start >= 0 and end >= 0 else None


Task = Callable[[Random, Setting], Conversation]


def vary(rng: Random, question: str) -> str:
    """`question`, sometimes in small letters or without its question mark."""
    style = rng.random()
    if style < 0.06:
        return question.lower()
    return question.rstrip("?.") if style < 0.1 else question
