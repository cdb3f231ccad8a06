"""Which token ids of a turn were told, and when the next ones are due: about four times a second.

Comes in: the engine's tokens. Goes out: Generated events. A turn that tells nothing pays nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from qwq_local.events import Generated

INTERVAL_S = 0.25


class Telling:
    """Tells of the tokens after the first `n_prompt`; the `n_known` that follow these are known already."""

    def __init__(self, clock: Callable[[], float], n_prompt: int, n_known: int) -> None:
        self._clock = clock
        self._n_prompt = n_prompt
        self._n_told = self._n_right = n_known
        self._due_at = clock() + INTERVAL_S

    @property
    def is_due(self) -> bool:
        """Whether it is time to tell again."""
        return self._clock() >= self._due_at

    def cut(self, n_tokens: int) -> None:
        """The engine's tokens were cut back to so many: what was told beyond is wrong."""
        self._n_right = min(self._n_right, n_tokens - self._n_prompt)

    def next(self, tokens: Sequence[int], n_thinking: int) -> Generated | None:
        """What was not told yet of the engine's tokens; None when nothing is new."""
        self._due_at = self._clock() + INTERVAL_S
        start, end = self._n_right, len(tokens) - self._n_prompt
        if start == end == self._n_told:
            return None
        self._n_told = self._n_right = end
        return Generated(start, tuple(tokens[self._n_prompt + start :]), n_thinking)
