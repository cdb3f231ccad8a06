"""What a repetition is and how much of it is too much: the values of the loop guard."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Loop:
    """A repetition: cut the text back to its first `start` tokens, which keep the material once.

    `start` counts tokens from the first one fed. It lies where the second occurrence begins, moved to the
    nearest beginning of a sentence when the cycle holds one. `period` is in tokens, for sentences
    the latest distance between two alike.
    """

    start: int
    period: int
    kind: Literal["cycle", "sentence"]


@dataclass(frozen=True, slots=True)
class LoopSettings:
    """How much repetition is too much, in tokens and words; the defaults are for the thinking.

    A cycle fires once it spans `short_repeats` periods or `short_tokens`, whichever is less, but at least
    `long_repeats` periods and `min_tokens` (`min_symbol_tokens` when no letter is in it); in code and tables
    `code_factor` times that. Sentences fire at `stale_words` words that say nothing new, or when one
    sentence has varied `steps` times; both net of what was new in between.
    """

    max_period: int = 1500
    min_tokens: int = 640
    min_symbol_tokens: int = 1500
    short_repeats: int = 8
    short_tokens: int = 2000
    long_repeats: int = 3
    code_factor: int = 2
    stale_words: int = 450
    steps: int = 160

    @classmethod
    def thinking(cls) -> LoopSettings:
        """Settings for the thinking: a loop there costs minutes, a false alarm only an early answer."""
        return cls()

    @classmethod
    def answer(cls) -> LoopSettings:
        """Settings for the answer, where tables, code and lists live and an alarm ends the turn."""
        return cls(
            min_tokens=1200,
            min_symbol_tokens=3000,
            short_repeats=12,
            short_tokens=3000,
            long_repeats=4,
            code_factor=3,
            stale_words=900,
            steps=400,
        )

    def required_tokens(self, period: int, has_letters: bool, in_code: bool) -> int:
        """How many tokens a cycle of `period` tokens must span to be a loop."""
        floor = self.min_tokens if has_letters else self.min_symbol_tokens
        by_period = max(self.long_repeats * period, min(self.short_repeats * period, self.short_tokens))
        return max(floor, by_period) * (self.code_factor if in_code else 1)
