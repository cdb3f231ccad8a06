"""Tokens of a turn as they are known: exact when the turn tells them, one for each piece since then.

Events and the time come in, counts and a rate come out.
"""

from __future__ import annotations

from collections import deque

from qwq_local.events import Generated, Planned
from qwq_local.terminal.progress import Clock

RATE_OVER_S = 5.0
"""The rate is that of the last seconds: steady enough to be read, and it follows a long context."""

RATE_AFTER_S = 0.5
MARK_EVERY_S = 0.25


class Meter:
    """Counts one turn."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.n_ctx = 0
        self.thinking_budget = 0
        self.yarn_factor = 1.0
        self._prompt_tokens = 0
        self._thinking = self._answer = 0
        self._pieces = 0  # of the thinking, later of the answer, since the last exact count
        self._is_answering = False
        self._marks: deque[tuple[float, int]] = deque()

    @property
    def thinking_tokens(self) -> int:
        """Tokens of the thinking; never more than there are."""
        return self._thinking + (0 if self._is_answering else self._pieces)

    @property
    def answer_tokens(self) -> int:
        """Tokens of the answer; never more than there are."""
        return self._answer + (self._pieces if self._is_answering else 0)

    @property
    def used_tokens(self) -> int:
        """Tokens in the context."""
        return self._prompt_tokens + self._generated

    @property
    def _generated(self) -> int:
        return self._thinking + self._answer + self._pieces

    def plan(self, event: Planned) -> None:
        """Take what was decided."""
        self.n_ctx, self.thinking_budget = event.n_ctx, event.thinking_budget
        self.yarn_factor, self._prompt_tokens = event.yarn_factor, event.prompt_tokens

    def prompt(self, n_tokens: int) -> None:
        """Take the exact length of the prompt."""
        self._prompt_tokens = n_tokens

    def count(self, event: Generated) -> None:
        """Take an exact count."""
        before = self._generated
        self._thinking = event.thinking
        self._answer = max(0, event.start + len(event.tokens) - event.thinking)
        self._pieces = 0
        if self._generated < before:
            self._marks.clear()  # Tokens were taken back: no rate leads across.

    def piece(self, is_answer: bool) -> None:
        """Take a piece of thinking or answer: at least one token."""
        if is_answer != self._is_answering:
            self._thinking, self._answer = self.thinking_tokens, self.answer_tokens
            self._pieces, self._is_answering = 0, is_answer
        self._pieces += 1
        if not self._marks:
            self._marks.append((self._clock(), self._generated))

    def rate(self) -> float:
        """Tokens per second over the last seconds; 0 while that cannot be said."""
        now, generated = self._clock(), self._generated
        if not self._marks:
            return 0.0
        if now - self._marks[-1][0] >= MARK_EVERY_S:
            self._marks.append((now, generated))
            while len(self._marks) > 2 and now - self._marks[1][0] >= RATE_OVER_S:
                self._marks.popleft()
        then, before = self._marks[0]
        return max(0, generated - before) / (now - then) if now - then >= RATE_AFTER_S else 0.0
