"""What a person may still ask of a turn while it runs, and a turn that goes on from where another ended.

Wishes come in from any thread; the turn takes them before its next token. Knows no screen and no engine.
"""

from __future__ import annotations

import re
import threading
import unicodedata
from collections import deque
from dataclasses import dataclass

_TAG = re.compile(r"<(?=/?think>)")


@dataclass(frozen=True, slots=True)
class Opening:
    """A turn that was begun before: the token ids of its prompt and of what followed, sampled or forced.

    `steered` are the person's sentences among those, in order.
    """

    prompt: tuple[int, ...]
    generated: tuple[int, ...]
    steered: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class AnswerNow:
    """End the thinking and answer."""


@dataclass(frozen=True, slots=True)
class Steer:
    """Put this sentence into the thinking, as the model's own next one."""

    text: str


class TurnControl:
    """What a person asks of the running turn, from any thread; the turn takes it before its next token."""

    def __init__(self) -> None:
        self._wishes: deque[AnswerNow | Steer] = deque()
        self._runs = threading.Event()
        self._runs.set()

    def answer_now(self) -> None:
        """End the thinking and answer; nothing when it answers already."""
        self._wishes.append(AnswerNow())

    def steer(self, text: str) -> None:
        """Put a sentence into the thinking; nothing when it answers already."""
        self._wishes.append(Steer(text))

    def pause(self) -> None:
        """Let the turn wait before its next token, until `go_on`."""
        self._runs.clear()

    def go_on(self) -> None:
        """End the pause."""
        self._runs.set()

    @property
    def is_wanted(self) -> bool:
        """Whether there is a wish or a pause; asked before every token."""
        return bool(self._wishes) or not self._runs.is_set()

    def take(self) -> AnswerNow | Steer | None:
        """The next wish, if any."""
        return self._wishes.popleft() if self._wishes else None

    def wait(self, seconds: float) -> bool:
        """Whether the turn may run; waits so long at most for the end of a pause."""
        return self._runs.wait(seconds)


def sentence_of(text: str) -> str:
    """A person's text as a sentence in the thinking: one line, composed as its tokens will be (NFC), without
    control characters or a tag that is one.
    """
    line = " ".join(unicodedata.normalize("NFC", text).split())
    line = "".join(character for character in line if unicodedata.category(character) not in ("Cc", "Cs"))
    return _TAG.sub("< ", line)
