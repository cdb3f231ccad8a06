"""Tokens: the context that a prompt needs, its YaRN factor, and the shares of thinking and answer.

When prompt, thinking budget and answer reserve do not fit the window together, the thinking shrinks first,
then the reserve, each down to a sixteenth of the native window.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from qwq_local.errors import PromptTooLong, UsageError
from qwq_local.planning.shape import padded

# Tokens for the sentence that closes the thinking when the model does not.
CLOSING = 64
_FLOOR = 16


class Scaling(StrEnum):
    """How positions past the native window are scaled into it."""

    YARN = "yarn"
    LINEAR = "linear"


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """A rope scaling; factor 1 is none. `origin` is the window in tokens that it scales from."""

    factor: float = 1.0
    origin: int = 0
    kind: Scaling = Scaling.YARN

    @property
    def is_on(self) -> bool:
        """Whether anything is scaled."""
        return self.factor > 1


@dataclass(frozen=True, slots=True)
class Needs:
    """What a run needs, in tokens. An `n_ctx` of None lets the plan choose.

    `takes_largest` asks for the largest native context that fits, not the smallest that is enough.
    """

    prompt_tokens: int
    thinking_budget: int
    answer_reserve: int
    n_ctx: int | None = None
    takes_largest: bool = False


@dataclass(frozen=True, slots=True)
class Window:
    """A model's native window in tokens, and the factors that stretch it.

    With a `yarn` of None the plan chooses the factor. An `origin` of 0 means the native window.
    """

    native: int
    factors: tuple[float, ...] = (1.0,)
    yarn: float | None = None
    origin: int = 0
    kind: Scaling = Scaling.YARN

    @property
    def allowed_factors(self) -> tuple[float, ...]:
        """The factors that may be chosen, smallest first."""
        return (self.yarn,) if self.yarn is not None else tuple(sorted({1.0, *self.factors}))

    @property
    def largest(self) -> int:
        """The largest window that may be chosen, in tokens."""
        return self.tokens(self.allowed_factors[-1])

    def tokens(self, factor: float) -> int:
        """The window under a factor."""
        return int(self.native * factor)

    def factor_for(self, n_tokens: int) -> float:
        """The smallest allowed factor whose window holds this many tokens, else the largest."""
        factors = self.allowed_factors
        return next((factor for factor in factors if n_tokens <= self.tokens(factor)), factors[-1])

    def scaling(self, factor: float) -> RopeScaling:
        """The rope scaling of a factor."""
        return RopeScaling(factor, self.origin or self.native, self.kind) if factor > 1 else RopeScaling()


@dataclass(frozen=True, slots=True)
class Shares:
    """A context in tokens, and the parts of it for thinking and answer."""

    n_ctx: int
    thinking_budget: int
    answer_reserve: int
    rope: RopeScaling


def thinking_floor(needs: Needs, window: Window) -> int:
    """The smallest thinking budget that a plan goes down to, in tokens."""
    limit = min(needs.n_ctx or window.native, window.native)
    return min(limit // _FLOOR, needs.thinking_budget)


def share_window(needs: Needs, window: Window) -> Shares:
    """The smallest context that holds prompt, thinking and answer, or as much of them as the window allows.

    Raises PromptTooLong when the prompt leaves no room to answer, UsageError for an n_ctx past the window.
    """
    taken = needs.prompt_tokens + CLOSING
    needed = taken + needs.thinking_budget + needs.answer_reserve
    limit, factor = _limit(needs, window, needed)
    rope = window.scaling(factor)
    if needed <= limit:
        n_ctx = needs.n_ctx or min(padded(needed), limit)
        return Shares(n_ctx, needs.thinking_budget, needs.answer_reserve, rope)
    floor = thinking_floor(needs, window)
    reserve_floor = min(min(limit, window.native) // _FLOOR, needs.answer_reserve)
    thinking = max(floor, limit - taken - needs.answer_reserve)
    reserve = limit - taken - thinking
    if reserve < reserve_floor:
        raise _too_long(needs, window, limit, taken + floor + reserve_floor)
    return Shares(limit, thinking, reserve, rope)


def _limit(needs: Needs, window: Window, needed: int) -> tuple[int, float]:
    """The most tokens of the context, and the factor for them."""
    if needs.n_ctx is None:
        factor = window.factor_for(needed)
        return window.tokens(factor), factor
    if needs.n_ctx > window.largest:
        raise UsageError(
            f"n_ctx {needs.n_ctx:,} is past the window of {window.largest:,} tokens."
            f"{larger_factor(needs.n_ctx, window)}"
        )
    return needs.n_ctx, window.factor_for(needs.n_ctx)


def _too_long(needs: Needs, window: Window, limit: int, least: int) -> PromptTooLong:
    """`least` is what prompt, smallest thinking and smallest answer take together."""
    factor = window.factor_for(limit)
    stretched = f" (factor {factor:g} over {window.native:,})" if factor > 1 else ""
    what = (
        f"the prompt has {needs.prompt_tokens:,} tokens and needs {least:,} with a little thinking and answer"
        if needs.prompt_tokens
        else f"a little thinking and answer take {least:,} tokens, whatever is asked"
    )
    if needs.n_ctx is not None and needs.n_ctx < window.largest:
        advice = f" Leave n_ctx out, or raise it up to {window.largest:,}."
    else:
        over = least - window.largest
        shorter = f" Shorten it by {over:,} tokens, or ask it in parts: qwq ask --split."
        advice = larger_factor(least, window) or shorter
    return PromptTooLong(f"{what}; the window holds {limit:,}{stretched}.{advice}")


def larger_factor(tokens: int, window: Window) -> str:
    """Advice to set the smallest YaRN factor whose window holds that many tokens; empty when none does."""
    for factor in sorted(window.factors):
        if factor > window.allowed_factors[-1] and window.tokens(factor) >= tokens:
            return f" Try --set yarn={factor:g}: a window of {window.tokens(factor):,} tokens."
    return ""
