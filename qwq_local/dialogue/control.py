"""What the user can ask of a reply while it runs, and where a reply that continues another one starts."""

from __future__ import annotations

import re
import threading
import unicodedata
from collections import deque
from dataclasses import dataclass

_TAG = re.compile(r"<(?=/?think>)")


@dataclass(frozen=True, slots=True)
class Opening:
    """Where a reply starts: the token ids of the prompt and of what an earlier reply generated after it.

    `generated` holds sampled and forced tokens; `steered` are the sentences among them that the user put in,
    in order.
    """

    prompt: tuple[int, ...]
    generated: tuple[int, ...] = ()
    steered: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class AnswerNow:
    """End the thinking and answer."""


@dataclass(frozen=True, slots=True)
class Steer:
    """Put this sentence into the thinking, as the model's own next one."""

    text: str


class ReplyControl:
    """What the user asks of the running reply, from any thread; the reply reads it before its next token."""

    def __init__(self) -> None:
        self._requests: deque[AnswerNow | Steer] = deque()
        self._runs = threading.Event()
        self._runs.set()

    def answer_now(self) -> None:
        """End the thinking and answer; does nothing once the answer has begun."""
        self._requests.append(AnswerNow())

    def steer(self, text: str) -> None:
        """Put a sentence into the thinking; does nothing once the answer has begun."""
        self._requests.append(Steer(text))

    def pause(self) -> None:
        """Make the reply wait before its next token, until `resume`."""
        self._runs.clear()

    def resume(self) -> None:
        """End the pause."""
        self._runs.set()

    @property
    def is_paused(self) -> bool:
        """Whether the reply must wait."""
        return not self._runs.is_set()

    def take(self) -> AnswerNow | Steer | None:
        """The next request, if any."""
        return self._requests.popleft() if self._requests else None

    def wait(self, seconds: float) -> bool:
        """Wait at most this long for the end of a pause; returns whether the reply may run."""
        return self._runs.wait(seconds)


def sentence_of(text: str) -> str:
    """A user's text as a sentence of the thinking: one line in NFC, without control characters and tags."""
    line = " ".join(unicodedata.normalize("NFC", text).split())
    line = "".join(character for character in line if unicodedata.category(character) not in ("Cc", "Cs"))
    return _TAG.sub("< ", line)
