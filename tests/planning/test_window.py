"""The division of the window, its YaRN factor, and a window that is too small."""

from __future__ import annotations

import pytest

from qwq_local.errors import PromptTooLong, UsageError
from qwq_local.planning.window import CLOSING, Needs, RopeScaling, Scaling, Shares, Window, share_window

QWQ = Window(native=32_768, factors=(1, 2, 4), origin=32_768)
OFF = Window(native=32_768, factors=(1, 2, 4), yarn=1)


def unscaled(n_ctx: int, thinking: int, reserve: int) -> Shares:
    return Shares(n_ctx, thinking, reserve, RopeScaling())


def test_the_context_is_no_larger_than_prompt_thinking_and_answer_need() -> None:
    assert share_window(Needs(100, 1000, 500), QWQ) == unscaled(1792, 1000, 500)
    assert share_window(Needs(12_000, 16_384, 4_096), QWQ) == unscaled(32_768, 16_384, 4_096)


@pytest.mark.parametrize(
    ("prompt", "factor"),
    [(0, 1), (12_224, 1), (12_225, 2), (30_000, 2), (44_992, 2), (44_993, 4), (110_528, 4), (120_000, 4)],
)
def test_the_factor_is_the_smallest_whose_window_holds_prompt_thinking_and_answer(
    prompt: int, factor: float
) -> None:
    """To the token: 12,224 + 64 + 16,384 + 4,096 are 32,768."""
    shares = share_window(Needs(prompt, 16_384, 4_096), QWQ)
    assert shares.rope == (RopeScaling(factor, 32_768) if factor > 1 else RopeScaling())
    assert (
        prompt + CLOSING + shares.thinking_budget + shares.answer_reserve <= shares.n_ctx <= 32_768 * factor
    )


def test_past_the_largest_factor_the_thinking_shrinks_then_the_reserve() -> None:
    """Each down to a sixteenth of the native window: 2,048 tokens."""
    assert share_window(Needs(112_000, 16_384, 4_096), QWQ).thinking_budget == 14_912
    tight = share_window(Needs(126_500, 16_384, 4_096), QWQ)
    assert (tight.n_ctx, tight.thinking_budget, tight.answer_reserve) == (131_072, 2_048, 2_460)
    with pytest.raises(PromptTooLong, match=r"130,000 tokens.*134,160.*131,072 \(factor 4 .*by 3,088 tokens"):
        share_window(Needs(130_000, 16_384, 4_096), QWQ)


def test_with_yarn_off_the_native_window_is_divided_the_same_way() -> None:
    assert share_window(Needs(20_000, 16_384, 4_096), OFF) == unscaled(32_768, 8_608, 4_096)
    assert share_window(Needs(27_000, 16_384, 4_096), OFF) == unscaled(32_768, 2_048, 3_656)
    with pytest.raises(PromptTooLong, match=r"40,000 tokens.*32,768.*yarn=2: a window of 65,536"):
        share_window(Needs(40_000, 16_384, 4_096), OFF)
    with pytest.raises(PromptTooLong, match="yarn=4"):
        share_window(Needs(64_000, 16_384, 4_096), OFF)


def test_no_share_falls_below_its_floor_and_all_of_them_fit_the_window() -> None:
    for prompt in range(0, 28_609, 511):
        shares = share_window(Needs(prompt, 16_384, 4_096), OFF)
        assert shares.n_ctx <= 32_768
        assert prompt + shares.thinking_budget + shares.answer_reserve + CLOSING <= shares.n_ctx
        assert shares.thinking_budget >= 2_048
        assert shares.answer_reserve >= 2_048
    with pytest.raises(PromptTooLong):
        share_window(Needs(28_609, 16_384, 4_096), OFF)


def test_a_setting_below_the_minimum_is_used() -> None:
    """With no thinking and ten tokens of answer, the prompt can fill the window."""
    assert share_window(Needs(32_694, 0, 10), OFF) == unscaled(32_768, 0, 10)


def test_a_set_factor_is_used_even_if_none_is_needed() -> None:
    forced = Window(32_768, (1, 2, 4), yarn=4, origin=32_768)
    assert share_window(Needs(100, 1000, 500), forced) == Shares(1792, 1000, 500, RopeScaling(4, 32_768))


def test_the_origin_comes_from_the_profile_and_the_kind_from_the_file() -> None:
    linear = Window(4096, (1, 8), origin=2048, kind=Scaling.LINEAR)
    assert share_window(Needs(10_000, 1000, 500), linear).rope == RopeScaling(8, 2048, Scaling.LINEAR)
    assert share_window(Needs(10_000, 1000, 500), Window(4096, (1, 4))).rope.origin == 4096


def test_a_set_context_bounds_everything_and_uses_the_factor_it_needs() -> None:
    assert share_window(Needs(100, 16_384, 4_096, n_ctx=8_192), QWQ) == unscaled(8_192, 3_932, 4_096)
    assert share_window(Needs(100, 16_384, 4_096, n_ctx=40_000), QWQ).rope.factor == 2
    with pytest.raises(PromptTooLong, match="raise it up to 131,072"):
        share_window(Needs(9_000, 16_384, 4_096, n_ctx=8_192), QWQ)
    with pytest.raises(UsageError, match=r"40,000 is past the window of 32,768.*yarn=2"):
        share_window(Needs(100, 16_384, 4_096, n_ctx=40_000), OFF)
