"""A text too long for a window cut into parts that overlap: text and a measure in, parts out, in linear time.

A part ends at the last paragraph border that leaves it at least half full, else at a line's, a sentence's, a
word's end, else between two characters. Knows no tokens, only a measure of texts.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

from qwq_local.dialogue.borders import first_border, is_inside, last_border

Measure = Callable[[str], int]
"""The size of a text, such as its tokens: about additive, and growing with the text."""

_SMALLEST_BLOCK, _LARGEST_BLOCK = 256, 8192
_FIRST_SLACK = 0.02


@dataclass(frozen=True, slots=True)
class Part:
    """A part of a text: from `start` to `end` in characters, and its measured size."""

    start: int
    end: int
    size: int


def cut(text: str, limit: int, overlap: int, measure: Measure) -> list[Part]:
    """The parts of a text, in order: each at most `limit`, sharing at most `overlap` with the one before it.

    Together they cover the text, and each goes on past the one before. Raises ValueError for a limit that
    does not hold a character, or less than twice the overlap.
    """
    if limit < 1 or not 0 <= 2 * overlap <= limit:
        raise ValueError(f"a limit of {limit} with an overlap of {overlap}")
    if not text:
        return []
    cutter = _Cutter(text, limit, overlap, measure)
    parts: list[Part] = []
    start = covered = 0
    while covered < len(text):
        part = cutter.part(start, covered)
        parts.append(part)
        covered = part.end
        start = cutter.overlap_start(part)
    return parts


class _Scale:
    """The size of the text up to any position, exact between blocks and interpolated inside them."""

    def __init__(self, text: str, block: int, measure: Measure) -> None:
        self._positions = [*range(0, len(text), block), len(text)]
        self._sizes = [0.0]
        for start, end in pairwise(self._positions):
            self._sizes.append(self._sizes[-1] + measure(text[start:end]))

    def size_at(self, position: int) -> float:
        return _between(self._positions, self._sizes, position)

    def position_at(self, size: float) -> int:
        return int(_between(self._sizes, self._positions, size))


def _between(xs: list[float] | list[int], ys: list[float] | list[int], x: float) -> float:
    """The value at `x` of the line through the points; beyond its ends, the last value."""
    right = bisect_right(xs, x)
    if right == len(xs):
        return ys[-1]
    if right == 0:
        return ys[0]
    share = (x - xs[right - 1]) / (xs[right] - xs[right - 1])
    return ys[right - 1] + share * (ys[right] - ys[right - 1])


class _Cutter:
    """One text being cut."""

    def __init__(self, text: str, limit: int, overlap: int, measure: Measure) -> None:
        self._text = text
        self._limit = limit
        self._overlap = overlap
        self._measure = measure
        self._scale = _Scale(text, min(max(limit, _SMALLEST_BLOCK), _LARGEST_BLOCK), measure)

    def part(self, start: int, covered: int) -> Part:
        """The part that begins at `start` and goes on past `covered`; it gives up its overlap if it must."""
        target, slack = float(self._limit), _FIRST_SLACK
        while True:
            reach = max(self._scale.position_at(self._scale.size_at(start) + target), covered + 1)
            end = len(self._text)
            if reach < end:
                end = last_border(self._text, max(covered, (start + reach) // 2), reach)
            size = self._measure(self._text[start:end])
            if size <= self._limit:
                return Part(start, end, size)
            if reach == covered + 1:
                if start == covered:
                    raise ValueError(f"a limit of {self._limit} does not hold the character at {start}")
                start, target, slack = covered, float(self._limit), _FIRST_SLACK
                continue
            # The estimate was too low: ask for less, and for much less when that happens again.
            target *= self._limit / size * (1 - slack)
            slack = min(2 * slack, 0.75)

    def overlap_start(self, part: Part) -> int:
        """Where the next part begins: at a border, so that what is shared is at most the overlap."""
        if part.end == len(self._text) or not self._overlap:
            return part.end
        low = self._scale.position_at(self._scale.size_at(part.end) - self._overlap)
        low = max(low, (part.start + part.end) // 2 + 1)
        while low < part.end:
            start = first_border(self._text, low, (low + part.end) // 2)
            shared = self._measure(self._text[start : part.end])
            if shared <= self._overlap and not is_inside(self._text, start):
                return start
            low = (start + part.end + 1) // 2
        return part.end
