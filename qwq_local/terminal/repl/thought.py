"""One thought while it streams: pieces in; out of it an excerpt, its last rows, or all of it, row by row.

Its cost is linear: lines are kept as text and laid out when they are shown, the last rows from a memory of
rows, the whole once.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from qwq_local.terminal.layout import Row
from qwq_local.terminal.repl.rows import BLANK, BOLD, DIM, TAB, Look, Paper
from qwq_local.terminal.sanitize import Sanitizer, one_line, sanitize

EXCERPT_CHARS = 600
"""Characters at the end of a thought, whole lines, in which its last finished sentence is looked for."""

LINE_LIMIT = 4000
"""Characters after which a line is broken: what is open is laid out anew in every frame."""

STEERED = Look(BOLD, "▏you: ", "▏ ")
_DIM_BY_COLOR, _DIM_BY_MARK = Look(DIM), Look("", "│ ", "│ ")
_SENTENCE_END = re.compile(r"[.!?…][\"')\]”’]*(?=\s)|[。！？][”」』）]*|\n")


@dataclass(frozen=True, slots=True)
class TraceLine:
    """One line of a thought, sanitized: whether a blank row precedes it, whether the person wrote it."""

    text: str
    gap: bool = False
    is_steered: bool = False


class Thought:
    """Feed its pieces and the person's sentences; ask for rows."""

    def __init__(self) -> None:
        self._pieces: list[str] = []
        self._sanitizer = Sanitizer()
        self._open = ""
        self._lines: list[TraceLine] = []
        self._gap = False
        self._n_taken = 0  # lines whose rows are all taken
        self._offset = 0  # characters of the next line whose rows are taken
        self._memory: dict[int, list[Row]] = {}
        self._memory_paper = Paper(0)

    def feed(self, text: str) -> None:
        """Take the next piece; it is read when somebody looks."""
        self._pieces.append(text)

    def steer(self, text: str) -> None:
        """Take a sentence of the person: lines of their own between blank rows."""
        self.end_line()
        self._gap = True
        for line in sanitize(text).strip().split("\n"):
            self._end(line, is_steered=True)
        self._gap = True

    def recall(self, text: str, steered: Sequence[str]) -> None:
        """Take what there is of a thought, the person's sentences in it in their order."""
        for sentence in steered:
            before, found, after = text.partition(sentence)
            if found:
                self.feed(before)
                self.steer(sentence)
                text = after
        self.feed(text)

    def end_line(self) -> None:
        """Begin a new line if one is open, so that something else can stand between."""
        self._read()
        if self._open:
            self._read_lines("\n")

    def excerpt(self, width: int) -> str:
        """The last finished sentence, or what there is of the first, in at most so many cells."""
        self._read()
        parts, size = [self._open], len(self._open)
        for line in reversed(self._lines):
            if size > EXCERPT_CHARS:
                break
            parts.append(f"you: {line.text}" if line.is_steered else line.text)
            size += len(line.text)
        text = "\n".join(reversed(parts))
        sentences = [match.end() for match in _SENTENCE_END.finditer(text)]
        for start, end in zip([*sentences[-2::-1], 0], reversed(sentences), strict=False):
            if sentence := text[start:end].strip():
                return one_line(sentence, width)
        return one_line(text, width)

    def tail(self, paper: Paper, n_rows: int) -> list[Row]:
        """The last so many rows."""
        self._read()
        known, self._memory = (self._memory, {}) if paper == self._memory_paper else ({}, {})
        self._memory_paper = paper
        is_open = bool(self._open.strip())
        shown = _line_rows(self._open_line(), paper) if is_open else []
        for index in range(len(self._lines) - 1, -1, -1):
            if len(shown) >= n_rows:
                break
            rows = known.get(index) or _line_rows(self._lines[index], paper)
            self._memory[index] = rows
            shown = rows + shown
        return shown[max(0, len(shown) - n_rows) :]

    def take(self, paper: Paper) -> tuple[list[Row], list[Row]]:
        """The rows that are final and were not taken before, from the beginning on, and those that are not.

        Rows are broken greedily: text that follows changes only the last. Joined, the final rows do not
        depend on when they are taken, as long as the width stays.
        """
        self._read()
        final: list[Row] = []
        for line in self._lines[self._n_taken :]:
            final += _line_rows(line, paper, self._offset)
            self._n_taken += 1
            self._offset = 0
        line = self._open_line()
        if not line.text.strip():
            return final, []
        rows = _line_rows(line, paper, self._offset)
        last = paper.spans(line.text[self._offset :], _look(line, paper))[-1][0]
        if not last:
            return final, rows
        self._offset += last
        return final + rows[:-1], rows[-1:]

    def _open_line(self) -> TraceLine:
        return TraceLine(self._open.expandtabs(TAB), self._has_gap)

    @property
    def _has_gap(self) -> bool:
        return self._gap and bool(self._lines)

    def _read(self) -> None:
        """Read the pieces that came since somebody looked."""
        if self._pieces:
            text = self._sanitizer.feed("".join(self._pieces))
            self._pieces.clear()
            self._read_lines(text)

    def _read_lines(self, text: str) -> None:
        *ended, self._open = (self._open + text).split("\n")
        for line in ended:
            self._end(self._cut(line))
        self._open = self._cut(self._open)

    def _cut(self, line: str) -> str:
        """End parts of a line until the rest is short, at places that do not depend on its pieces."""
        start = 0
        while len(line) - start > LINE_LIMIT:
            self._end(line[start : start + LINE_LIMIT])
            start += LINE_LIMIT
        return line[start:]

    def _end(self, line: str, is_steered: bool = False) -> None:
        text = line.expandtabs(TAB).rstrip()
        if text:
            self._lines.append(TraceLine(text, self._has_gap, is_steered))
        self._gap = not text


def _look(line: TraceLine, paper: Paper) -> Look:
    if line.is_steered:
        return STEERED
    return _DIM_BY_COLOR if paper.has_color else _DIM_BY_MARK


def _line_rows(line: TraceLine, paper: Paper, offset: int = 0) -> list[Row]:
    gap = [BLANK] if line.gap and not offset else []
    return gap + paper.rows(line.text[offset:], _look(line, paper))
