"""The first plan: how large the window is, and how many tokens of it the thinking and the answer get.

Tokens in, tokens out, arithmetic only. When prompt, thinking budget and answer reserve do not fit the
window together, the thinking gives way first, then the reserve, each down to a sixteenth of the window.
"""

from __future__ import annotations

from dataclasses import dataclass

from qwq_local.errors import PromptTooLong, UsageError

# llama.cpp pads the KV cache to this many tokens anyway.
GRANULE = 256
# Tokens kept for the sentence that closes a thinking which does not end by itself.
CLOSING = 64
_FLOOR = 16


@dataclass(frozen=True, slots=True)
class Wish:
    """What a run asks for, in tokens; `n_ctx` None lets the plan choose."""

    prompt_tokens: int
    thinking_budget: int
    answer_reserve: int
    n_ctx: int | None = None


@dataclass(frozen=True, slots=True)
class Window:
    """What the model offers: its native window in tokens and the YaRN factor that stretches it."""

    native: int
    yarn_factor: float = 1.0
    yarn_factors: tuple[float, ...] = (1.0,)

    @property
    def tokens(self) -> int:
        """The window in force."""
        return int(self.native * self.yarn_factor)


@dataclass(frozen=True, slots=True)
class Plan:
    """What was decided, in tokens: the context and its shares."""

    n_ctx: int
    thinking_budget: int
    answer_reserve: int


def plan_context(wish: Wish, window: Window) -> Plan:
    """The smallest context that holds prompt, thinking and answer, or as much of them as the window allows.

    Raises PromptTooLong when the prompt leaves no room to answer, UsageError for an n_ctx past the window.
    """
    if wish.n_ctx is not None and wish.n_ctx > window.tokens:
        raise UsageError(
            f"n_ctx {wish.n_ctx:,} is past the window of {window.tokens:,} tokens."
            f"{larger_factor(wish.n_ctx, window)}"
        )
    limit = wish.n_ctx or window.tokens
    taken = wish.prompt_tokens + CLOSING
    needed = taken + wish.thinking_budget + wish.answer_reserve
    if needed <= limit:
        return Plan(wish.n_ctx or _rounded(needed, limit), wish.thinking_budget, wish.answer_reserve)
    floor = limit // _FLOOR
    reserve = wish.answer_reserve
    thinking = limit - taken - reserve
    if thinking < min(floor, wish.thinking_budget):
        thinking = min(floor, wish.thinking_budget)
        reserve = limit - taken - thinking
    if reserve < min(floor, wish.answer_reserve):
        raise PromptTooLong(
            f"the prompt has {wish.prompt_tokens:,} tokens; the window of {limit:,} must also hold the "
            f"thinking and the answer.{_mend(wish, window)}"
        )
    return Plan(limit, thinking, reserve)


def _rounded(needed: int, limit: int) -> int:
    return min(-(-needed // GRANULE) * GRANULE, limit)


def _mend(wish: Wish, window: Window) -> str:
    if wish.n_ctx is not None and wish.n_ctx < window.tokens:
        return f" Leave n_ctx out, or raise it up to {window.tokens:,}."
    roomy = wish.prompt_tokens * (_FLOOR + 2) // _FLOOR
    return larger_factor(roomy, window) or " Shorten it."


def larger_factor(tokens: int, window: Window) -> str:
    """Advice to set the smallest YaRN factor whose window holds that many tokens; empty when none does."""
    for factor in sorted(window.yarn_factors):
        if factor > window.yarn_factor and window.native * factor >= tokens:
            return f" Try --set yarn={factor:g}: a window of {int(window.native * factor):,} tokens."
    return ""
