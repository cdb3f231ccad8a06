"""How a turn runs, and how far: budgets and the window in, the reason to stop out.

Knows token counts alone.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from qwq_local.dialogue.closing import Closings
from qwq_local.engine.api import Engine, Grammar, SamplerSettings
from qwq_local.events import CloseReason, FinishReason


@dataclass(frozen=True, slots=True)
class TurnSettings:
    """How a turn runs, in tokens. `max_tokens` 0 lets the answer go on to the end of the window.

    A turn that `wants_tokens` tells of the ids it makes, so that another one can go on from there.
    """

    sampler: SamplerSettings = field(default_factory=SamplerSettings)
    thinking_budget: int = 16384
    answer_reserve: int = 2048
    max_tokens: int = 0
    loop_guard: bool = True
    grammar: Grammar | None = None
    wants_tokens: bool = False


class Limits:
    """The limits of one turn over an engine; an answer of `n_answer` tokens was there before it.

    One that was at `max_tokens` may be as long again.
    """

    def __init__(self, engine: Engine, settings: TurnSettings, closings: Closings, n_answer: int = 0) -> None:
        self._engine = engine
        self._budget = settings.thinking_budget
        self._reserved = settings.answer_reserve + closings.longest
        self._max_tokens = settings.max_tokens
        if n_answer >= self._max_tokens > 0:
            self._max_tokens += n_answer

    def of_thinking(self, n_thinking: int, n_more: int = 0) -> CloseReason | None:
        """Why a thinking of so many tokens must end now, or would after `n_more`."""
        if n_thinking + n_more >= self._budget:
            return CloseReason.BUDGET
        return CloseReason.CONTEXT if self.room - n_more <= self._reserved else None

    def of_answer(self, n_answer: int) -> FinishReason | None:
        """Why an answer of so many tokens must end now."""
        if 0 < self._max_tokens <= n_answer:
            return FinishReason.MAX_TOKENS
        return FinishReason.CONTEXT if self.room <= 0 else None

    @property
    def room(self) -> int:
        """Tokens that the window still takes."""
        return self._engine.settings.n_ctx - len(self._engine.tokens)
