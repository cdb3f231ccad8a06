"""The first plan: what the window is divided into, and what happens when it is too small."""

from __future__ import annotations

import pytest

from qwq_local.errors import PromptTooLong, UsageError
from qwq_local.planning.context import CLOSING, Plan, Window, Wish, plan_context

QWQ = Window(native=32_768, yarn_factors=(1, 2, 4))


def test_the_context_is_no_larger_than_prompt_thinking_and_answer_need() -> None:
    assert plan_context(Wish(100, 1000, 500), QWQ) == Plan(1792, 1000, 500)
    assert plan_context(Wish(12_000, 16_384, 4_096), QWQ).n_ctx == 32_768


def test_the_thinking_gives_way_first_then_the_reserve() -> None:
    """Each down to a sixteenth of the window: 2,048 tokens of 32,768."""
    assert plan_context(Wish(20_000, 16_384, 4_096), QWQ) == Plan(32_768, 8_608, 4_096)
    assert plan_context(Wish(27_000, 16_384, 4_096), QWQ) == Plan(32_768, 2_048, 3_656)


def test_no_share_falls_below_its_floor_and_all_of_them_fill_the_window() -> None:
    for prompt in range(0, 28_609, 511):
        plan = plan_context(Wish(prompt, 16_384, 4_096), QWQ)
        assert plan.n_ctx <= 32_768
        assert prompt + plan.thinking_budget + plan.answer_reserve + CLOSING <= plan.n_ctx
        assert plan.thinking_budget >= 2_048
        assert plan.answer_reserve >= 2_048
    with pytest.raises(PromptTooLong):
        plan_context(Wish(28_609, 16_384, 4_096), QWQ)


def test_a_wish_below_the_floor_is_granted_as_it_is() -> None:
    """Somebody who wants no thinking and ten tokens of answer can fill the window with the prompt."""
    assert plan_context(Wish(32_694, 0, 10), QWQ) == Plan(32_768, 0, 10)


def test_a_prompt_that_is_too_long_is_told_which_factor_would_hold_it() -> None:
    with pytest.raises(PromptTooLong, match=r"40,000 tokens.*32,768.*yarn=2: a window of 65,536"):
        plan_context(Wish(40_000, 16_384, 4_096), QWQ)
    with pytest.raises(PromptTooLong, match="yarn=4"):
        plan_context(Wish(64_000, 16_384, 4_096), QWQ)
    with pytest.raises(PromptTooLong, match="Shorten it"):
        plan_context(Wish(131_000, 16_384, 4_096), Window(32_768, 4, (1, 2, 4)))


def test_yarn_stretches_the_window() -> None:
    assert plan_context(Wish(60_000, 16_384, 4_096), Window(32_768, 4, (1, 2, 4))).n_ctx == 80_640


def test_a_chosen_context_is_kept_and_bounds_everything() -> None:
    assert plan_context(Wish(100, 16_384, 4_096, n_ctx=8_192), QWQ) == Plan(8_192, 3_932, 4_096)
    with pytest.raises(PromptTooLong, match="raise it up to 32,768"):
        plan_context(Wish(9_000, 16_384, 4_096, n_ctx=8_192), QWQ)
    with pytest.raises(UsageError, match=r"40,000 is past the window of 32,768.*yarn=2"):
        plan_context(Wish(100, 16_384, 4_096, n_ctx=40_000), QWQ)
