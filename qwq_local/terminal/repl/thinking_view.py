"""A thought while it streams: hidden, as one sentence, as its last rows, or in full.

The cost is linear in the length of the thought: lines are kept as text and laid out only when they are shown.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from qwq_local.chat.events import ThinkView
from qwq_local.terminal.layout import BLANK, BOLD, DIM, TAB, Row, RowLayout, RowStyle
from qwq_local.terminal.markdown import LineCutter
from qwq_local.terminal.sanitizer import Sanitizer, one_line, sanitize

EXCERPT_CHARS = 600
"""The last finished sentence is searched in about this many characters at the end of a thought."""

STEERED = RowStyle(BOLD, "▏you: ", "▏ ")
_DIM_BY_COLOR, _DIM_BY_MARK = RowStyle(DIM), RowStyle("", "│ ", "│ ")
_OPEN = RowStyle(DIM, "▾ ", "  ")
_SENTENCE_END = re.compile(r"[.!?…][\"')\]”’]*(?=\s)|[。！？][”」』）]*|\n")


@dataclass(frozen=True, slots=True)
class _TraceLine:
    """One sanitized line of a thought; `gap`: a blank row precedes it; `is_steered`: the user wrote it."""

    text: str
    gap: bool = False
    is_steered: bool = False


class ThoughtView:
    """Shows thought `number`. Once shown in full, it stays so: final rows cannot be folded."""

    def __init__(self, number: int, view: ThinkView) -> None:
        self.is_full = view is ThinkView.FULL
        self._number = number
        self._view = view
        self._is_begun = False
        self._sanitizer = Sanitizer()
        self._cutter = LineCutter()
        self._lines: list[_TraceLine] = []
        self._gap = False
        self._n_taken = 0  # lines whose rows are all taken
        self._offset = 0  # characters of the next line whose rows are taken

    def feed(self, text: str) -> None:
        """Take the next piece."""
        for line, _ in self._cutter.feed(self._sanitizer.feed(text)):
            self._end(line)

    def steer(self, text: str) -> None:
        """Take a sentence of the user: lines of its own between blank rows."""
        self._end_line()
        self._gap = True
        for line in sanitize(text).strip().split("\n"):
            self._end(line, is_steered=True)
        self._gap = True

    def recall(self, text: str, steered: Sequence[str]) -> None:
        """Take the text of an earlier thought, and the user's sentences in it, in order."""
        for sentence in steered:
            before, found, after = text.partition(sentence)
            if found:
                self.feed(before)
                self.steer(sentence)
                text = after
        self.feed(text)

    def choose(self, view: ThinkView) -> None:
        """Change the view."""
        self._view = view
        self.is_full = self.is_full or view is ThinkView.FULL

    def take(self, layout: RowLayout, limit: int) -> tuple[list[Row], list[Row]]:
        """The final rows, and at most `limit` live rows."""
        if self.is_full:
            final, live = self._take_full(layout)
            return self._apart(final, live), live[-limit:]
        if self._view is ThinkView.OFF:
            return [], []
        if self._view is ThinkView.EXCERPT:
            excerpt = self._excerpt(layout.columns - 2)
            return [], [layout.row(excerpt or "thinking …", _OPEN)]
        rows = self._tail(layout, max(1, limit - 1))
        name = f"thought {self._number} · thinking …"
        if len(name) + 2 > layout.columns:
            name = one_line("thinking …", layout.columns - 2)
        head = [layout.row(name, _OPEN)]
        return [], [*head, *rows] if limit > 1 else rows or head

    def interrupt(self, layout: RowLayout) -> list[Row]:
        """The remaining final rows, when something else follows."""
        if not self.is_full:
            return []
        self._end_line()
        final, _ = self._take_full(layout)
        return self._apart(final, [])

    def _apart(self, final: list[Row], live: list[Row]) -> list[Row]:
        """The rows; the very first ones below a blank row."""
        if self._is_begun or not (final or live):
            return final
        self._is_begun = True
        return [BLANK, *final]

    def _end_line(self) -> None:
        if self._cutter.partial:
            self.feed("\n")

    def _excerpt(self, width: int) -> str:
        """The last finished sentence, or the start of the first, in at most `width` cells."""
        parts, size = [self._cutter.partial], len(self._cutter.partial)
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

    def _tail(self, layout: RowLayout, n_rows: int) -> list[Row]:
        line = self._open_line()
        shown = _line_rows(line, layout) if line.text.strip() else []
        for line in reversed(self._lines):
            if len(shown) >= n_rows:
                break
            shown = _line_rows(line, layout) + shown
        return shown[max(0, len(shown) - n_rows) :]

    def _take_full(self, layout: RowLayout) -> tuple[list[Row], list[Row]]:
        """The final rows that were not taken before, and the rows that may still change.

        Rows are broken greedily: text that follows changes only the last. Joined, the final rows do not
        depend on when they are taken, as long as the width stays.
        """
        final: list[Row] = []
        for line in self._lines[self._n_taken :]:
            final += _line_rows(line, layout, self._offset)
            self._n_taken += 1
            self._offset = 0
        line = self._open_line()
        if not line.text.strip():
            return final, []
        rows = _line_rows(line, layout, self._offset)
        last = layout.spans(line.text[self._offset :], _style(line, layout))[-1][0]
        if not last:
            return final, rows
        self._offset += last
        return final + rows[:-1], rows[-1:]

    def _open_line(self) -> _TraceLine:
        return _TraceLine(self._cutter.partial.expandtabs(TAB), self._has_gap)

    @property
    def _has_gap(self) -> bool:
        return self._gap and bool(self._lines)

    def _end(self, line: str, is_steered: bool = False) -> None:
        text = line.expandtabs(TAB).rstrip()
        if text:
            self._lines.append(_TraceLine(text, self._has_gap, is_steered))
        self._gap = not text


def _style(line: _TraceLine, layout: RowLayout) -> RowStyle:
    if line.is_steered:
        return STEERED
    return _DIM_BY_COLOR if layout.has_color else _DIM_BY_MARK


def _line_rows(line: _TraceLine, layout: RowLayout, offset: int = 0) -> list[Row]:
    gap = [BLANK] if line.gap and not offset else []
    return gap + layout.rows(line.text[offset:], _style(line, layout))
