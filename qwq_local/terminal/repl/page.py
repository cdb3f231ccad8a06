"""A text to read, line by line: its rows for a width, its hits in a search, what the person wrote in it.

Comes in: a Page. Goes out: rows as fragments with classes. Knows no window and no keys.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections import Counter
from dataclasses import dataclass

from prompt_toolkit.formatted_text import StyleAndTextTuples

from qwq_local.chat.events import Page
from qwq_local.terminal.layout import row_spans
from qwq_local.terminal.repl.rows import TAB
from qwq_local.terminal.repl.thought import STEERED
from qwq_local.terminal.sanitize import sanitize

MAX_HITS = 10_000


@dataclass(frozen=True, slots=True)
class Hit:
    """Where in a line the words stand that were searched for."""

    line: int
    start: int
    end: int


class PageLines:
    """The lines of a page, their rows for a width, and what is found in them; linear in the text.

    The person's sentences are marked: each once, since a thought may repeat them.
    """

    def __init__(self, page: Page) -> None:
        self.lines: list[str] = []
        self._steered: set[int] = set()
        left = Counter(line.strip() for text in page.steered for line in sanitize(text).split("\n"))
        for index, line in enumerate(sanitize(page.text).rstrip().split("\n")):
            text = line.expandtabs(TAB).rstrip()
            key = line.strip()
            if key and left[key]:
                left[key] -= 1
                self._steered.add(index)
                text = STEERED.first + text
            self.lines.append(text)
        self.rows: list[Hit] = []
        self.hits: list[Hit] = []
        self._width = 0

    def wrap(self, width: int) -> None:
        """Break the lines for a width."""
        if width != self._width:
            self._width = width
            self.rows = [
                Hit(index, start, end)
                for index, line in enumerate(self.lines)
                for start, end in row_spans(line, width)
            ]

    def search(self, words: str) -> None:
        """Find the words, large or small letters alike."""
        pattern = re.compile(re.escape(words), re.IGNORECASE)
        self.hits = []
        for index, line in enumerate(self.lines if words else ()):
            self.hits += [Hit(index, match.start(), match.end()) for match in pattern.finditer(line)]
            if len(self.hits) >= MAX_HITS:
                break

    def row_of(self, hit: Hit) -> int:
        """The row in which a hit begins."""
        starts = (hit.line, hit.start)
        return max(0, bisect_right(self.rows, starts, key=lambda row: (row.line, row.start)) - 1)

    def fragments(self, row: int, here: Hit | None) -> StyleAndTextTuples:
        """One row with its hits marked; the one that was gone to is `here`."""
        place = self.rows[row]
        line = self.lines[place.line]
        base = "class:steered" if place.line in self._steered else ""
        first = bisect_right(self.hits, place.line - 1, key=lambda hit: hit.line)
        parts: StyleAndTextTuples = []
        position = place.start
        for hit in self.hits[first:]:
            if hit.line != place.line or hit.start >= place.end:
                break
            start, end = max(hit.start, place.start), min(hit.end, place.end)
            if start < end:
                style = "class:here" if hit == here else "class:hit"
                parts += [(base, line[position:start]), (style, line[start:end])]
                position = end
        parts.append((base, line[position : place.end]))
        return parts
