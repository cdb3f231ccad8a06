"""Plain text into rows: wrapped at the window's width, marked in front, styled as a whole.

Styles are bold, dim and one red: attributes keep the terminal's own two colors, which its owner can read on
any background, and red is dark enough for white and bright enough for black. Bright black, the usual grey,
is invisible in some themes and is not used. Without color nothing is styled, and marks tell what is what.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import chain, repeat

from rich.cells import cell_len

from qwq_local.terminal.layout import MIN_WIDTH, Row, row_spans

BLANK = Row("", 0)
BOLD, DIM, RED = "1", "2", "31"
TAB = 4

_SGR = re.compile(r"\x1b\[[0-9;]*m")


@dataclass(frozen=True, slots=True)
class Look:
    """A style by its SGR number, for whole rows or their marks; marks of the first row and of the others."""

    style: str = ""
    first: str = ""
    rest: str = ""
    is_for_marks: bool = False


PLAIN = Look()


@dataclass(frozen=True, slots=True)
class Paper:
    """What rows are made for: so many columns, with color or without any escape sequence."""

    columns: int
    has_color: bool = True

    def row(self, text: str, look: Look = PLAIN) -> Row:
        """One row, whatever the text's width."""
        return self._row(look.first, text, look)

    def rows(self, text: str, look: Look = PLAIN) -> list[Row]:
        """The rows of a sanitized text, which may have several lines."""
        text = text.expandtabs(TAB)
        marks = chain([look.first], repeat(look.rest))
        return [
            self._row(mark, text[start:end], look)
            for mark, (start, end) in zip(marks, self.spans(text, look), strict=False)
        ]

    def spans(self, text: str, look: Look = PLAIN) -> list[tuple[int, int]]:
        """Where each row of a text without tabs starts and ends."""
        width = max(MIN_WIDTH, self.columns - cell_len(look.first))
        hang = cell_len(look.rest) - cell_len(look.first)
        return row_spans(text, width, max(0, min(hang, width - MIN_WIDTH)))

    def plain(self, row: Row) -> Row:
        """A row that was styled elsewhere, as this paper takes it."""
        return row if self.has_color else Row(_SGR.sub("", row.written), row.cells)

    def _row(self, mark: str, text: str, look: Look) -> Row:
        written = mark + text
        cells = cell_len(written)
        if self.has_color and look.style and text:
            styled, plain = (mark, text) if look.is_for_marks else (written, "")
            written = f"\x1b[{look.style}m{styled}\x1b[0m{plain}"
        return Row(written, cells)
