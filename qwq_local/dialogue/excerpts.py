"""Long texts cut into parts that overlap, and what each part holds of the files that it came from.

A part ends at the last paragraph border that leaves it at least half full, else at the end of a line, a
sentence or a word, else between two characters. It never cuts a character as a reader sees it: a letter from
its accent, a joined emoji, a flag (Unicode's grapheme clusters, UAX #29). Cutting takes linear time.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from wcwidth import grapheme_boundary_before

from qwq_local.dialogue.conversation import Attachment, one_line

Measure = Callable[[str], int]
"""The size of a text, such as its tokens: about additive, and growing with the text."""

_BETWEEN = "\n```\n\n"
_SMALLEST_BLOCK, _LARGEST_BLOCK = 256, 8192
_FIRST_SLACK = 0.02
_PATTERNS = (
    re.compile(r"\n[ \t\r]*\n+"),
    re.compile(r"\n"),
    re.compile(r"[.!?…][\"'”’»)\]]*\s+|[。！？｡]+[”’」』】）]*"),
    re.compile(r"\s+"),
)
# Code points before a position that are looked at, and beyond which a run of marks is no character any more.
_CONTEXT = 256
_LONGEST_CHARACTER = 64


@dataclass(frozen=True, slots=True)
class TextPart:
    """A part of a text: from `start` to `end` in characters, and its measured size."""

    start: int
    end: int
    size: int


def cut(text: str, limit: int, overlap: int, measure: Measure) -> list[TextPart]:
    """The parts of a text, in order: each at most `limit`, sharing at most `overlap` with the one before it.

    Together they cover the text, and each ends after the one before. Raises ValueError for a limit that
    does not hold a character, or less than twice the overlap.
    """
    if limit < 1 or not 0 <= 2 * overlap <= limit:
        raise ValueError(f"a limit of {limit} with an overlap of {overlap}")
    if not text:
        return []
    cutter = _Cutter(text, limit, overlap, measure)
    parts: list[TextPart] = []
    start = covered = 0
    while covered < len(text):
        part = cutter.part(start, covered)
        parts.append(part)
        covered = part.end
        start = cutter.overlap_start(part)
    return parts


class _Cutter:
    """One text being cut.

    `_sizes` are the sizes of the text up to some positions. Between these, they are interpolated.
    """

    def __init__(self, text: str, limit: int, overlap: int, measure: Measure) -> None:
        block = min(max(limit, _SMALLEST_BLOCK), _LARGEST_BLOCK)
        self._text = text
        self._limit = limit
        self._overlap = overlap
        self._measure = measure
        self._positions = [*range(0, len(text), block), len(text)]
        sizes = (measure(text[start:end]) for start, end in pairwise(self._positions))
        self._sizes = list(accumulate(sizes, initial=0))

    def _after(self, start: int, size: float) -> int:
        """About where a text of this size ends that begins at `start`; it begins before it if negative."""
        from numpy import interp

        size_at_start = interp(start, self._positions, self._sizes)
        return int(interp(size_at_start + size, self._sizes, self._positions))

    def part(self, start: int, covered: int) -> TextPart:
        """The part that begins at `start` and ends after `covered`; it gives up its overlap if it must."""
        target, slack = float(self._limit), _FIRST_SLACK
        while True:
            reach = max(self._after(start, target), covered + 1)
            end = len(self._text)
            if reach < end:
                end = _last_border(self._text, max(covered, (start + reach) // 2), reach)
            size = self._measure(self._text[start:end])
            if size <= self._limit:
                return TextPart(start, end, size)
            if reach == covered + 1:
                if start == covered:
                    raise ValueError(f"a limit of {self._limit} does not hold the character at {start}")
                start, target, slack = covered, float(self._limit), _FIRST_SLACK
                continue
            # The estimate was too low: ask for less, and for much less when that happens again.
            target *= self._limit / size * (1 - slack)
            slack = min(2 * slack, 0.75)

    def overlap_start(self, part: TextPart) -> int:
        """Where the next part begins: at a border, so that what is shared is at most the overlap."""
        if part.end == len(self._text) or not self._overlap:
            return part.end
        low = max(self._after(part.end, -self._overlap), (part.start + part.end) // 2 + 1)
        while low < part.end:
            start = _first_border(self._text, low, (low + part.end) // 2)
            shared = self._measure(self._text[start : part.end])
            if shared <= self._overlap and not is_inside(self._text, start):
                return start
            low = (start + part.end + 1) // 2
        return part.end


@dataclass(frozen=True, slots=True)
class Excerpt:
    """What one part holds: whole files and pieces of files, and of standard input."""

    attachments: tuple[Attachment, ...]
    stdin_text: str

    @property
    def length(self) -> int:
        """Characters of text."""
        return sum(len(each.text) for each in self.attachments) + len(self.stdin_text)


@dataclass(frozen=True, slots=True)
class _SourceText:
    """One text and where its body is in the joined one; no name: standard input."""

    name: str
    start: int
    end: int


class Sources:
    """Files, then standard input, as one text. Each file stands under its name, as it will in a prompt."""

    def __init__(self, attachments: Sequence[Attachment], stdin_text: str) -> None:
        pieces: list[str] = []
        self._sources: list[_SourceText] = []
        length = 0
        for name, text in [*((each.name, each.text) for each in attachments), ("", stdin_text)]:
            if not text:
                continue
            # As it will stand in a prompt, so that measuring the joined text counts the fences.
            head = f"{_BETWEEN}```{one_line(name)}\n" if name else _BETWEEN
            pieces += [head, text]
            self._sources.append(_SourceText(name, length + len(head), length + len(head) + len(text)))
            length += len(head) + len(text)
        self.text = "".join(pieces)

    @property
    def longest_name(self) -> str:
        """What the longest name looks like above an excerpt."""
        name = max((source.name for source in self._sources), key=len, default="")
        return _in_part(name, 1_000_000, 9_999_999)

    def excerpts(self, parts: Sequence[TextPart]) -> Iterator[Excerpt]:
        """What each part holds; parts are in order, and a part that holds only a name is left out."""
        for part in parts:
            attachments: list[Attachment] = []
            stdin_text = ""
            for source in self._sources:
                start, end = max(part.start, source.start), min(part.end, source.end)
                body = self.text[start:end]
                if not source.name:
                    stdin_text = body
                elif body.strip() and (start, end) == (source.start, source.end):
                    attachments.append(Attachment(source.name, body))
                elif body.strip():
                    begins = self.text.count("\n", source.start, start) + 1
                    ends = begins + body.rstrip("\n").count("\n")
                    attachments.append(Attachment(_in_part(source.name, begins, ends), body))
            if attachments or stdin_text.strip():
                yield Excerpt(tuple(attachments), stdin_text)


def _in_part(name: str, first: int, last: int) -> str:
    return f"{name}, line {first:,}" if first == last else f"{name}, lines {first:,} to {last:,}"


def _last_border(text: str, low: int, high: int) -> int:
    """The last position of the strongest border in `low < position <= high`; `high` is inside the text.

    If no whole character ends there, it is `high`.
    """
    for pattern in _PATTERNS:
        ends = [match.end() for match in pattern.finditer(text, low, high)]
        for position in reversed(ends):
            if position > low and not is_inside(text, position):
                return position
    whole = range(high, max(low, high - _LONGEST_CHARACTER), -1)
    return next((position for position in whole if not is_inside(text, position)), high)


def _first_border(text: str, low: int, high: int) -> int:
    """The first position of the strongest border in `low <= position <= high`, else `high`."""
    for pattern in _PATTERNS:
        for match in pattern.finditer(text, max(0, low - 1), high):
            if match.end() >= low and not is_inside(text, match.end()):
                return match.end()
    return next((position for position in range(low, high) if not is_inside(text, position)), high)


def is_inside(text: str, at: int) -> bool:
    """Whether the position is inside a character as a reader sees it."""
    if not 0 < at < len(text):
        return False
    if text[at - 1] < "\u0300" and text[at] < "\u0300":
        return text[at - 1 : at + 1] == "\r\n"
    start = max(0, at - _CONTEXT)
    return start + grapheme_boundary_before(text[start : at + 1], at + 1 - start) != at
