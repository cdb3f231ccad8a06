"""Rows of a terminal: text wrapped to the width of the window, styled, and written as characters.

Lines break after spaces and between Chinese, Japanese and Korean characters, but never before closing
punctuation. Wrapping is greedy: text that is appended later changes only the last row.

Our own text is plain, bold, dim or red. These keep the two colors that the terminal's owner chose. Bright
black, the usual grey, is invisible in some themes and is not used. Without color nothing is styled, and
marks such as `▸` carry the meaning.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from io import StringIO
from itertools import chain, repeat

from rich.cells import cell_len, chop_cells
from rich.color import ColorSystem
from rich.console import Console
from rich.text import Text

MIN_WIDTH = 8
"""The text of a row has at least this many cells, however deep its prefix."""

_OPENING = "（【「『《〈〔“‘"
_CLOSING = "，。、；：？！）】」』》〉〕”’…"
_IDEOGRAPH = (
    "\u1100-\u11ff\u2e80-\ua4cf\uac00-\ud7af\uf900-\ufaff\ufe30-\ufe4f\uff00-\uffef\U00020000-\U0003ffff"
)
_ATOM = re.compile(
    rf"\n|[^\S\n]+|[{_OPENING}]*(?:[{_IDEOGRAPH}]|[^\s{_IDEOGRAPH}]+)[{_CLOSING}]*|[{_OPENING}{_CLOSING}]+"
)

# Never written to: rich needs a console to look up styles.
_STYLES = Console(file=StringIO(), force_terminal=True, color_system="standard", legacy_windows=False)


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a terminal: what is written for it, and the cells that it takes."""

    written: str
    cells: int


def row_spans(text: str, width: int, hang: int = 0) -> list[tuple[int, int]]:
    """Start and end of each row of the text, without trailing white space.

    All rows but the first are `hang` cells narrower than `width`.
    """
    spans: list[tuple[int, int]] = []
    start = used = 0
    for atom_start, atom, cells in _atoms(text, max(width - hang, 1)):
        if atom == "\n":
            spans.append((start, atom_start))
            start, used = atom_start + 1, 0
        elif atom.isspace():
            used += len(atom)
        elif used and used + cells > (width - hang if spans else width):
            spans.append((start, atom_start))
            start, used = atom_start, cells
        else:
            used += cells
    spans.append((start, len(text)))
    return [(first, first + len(text[first:last].rstrip())) for first, last in spans]


def _atoms(text: str, width: int) -> Iterator[tuple[int, str, int]]:
    """Offset, text and cells of each unbreakable part. A word wider than a row comes in pieces that fit."""
    for match in _ATOM.finditer(text):
        atom, offset = match.group(), match.start()
        cells = cell_len(atom)
        if cells <= width or atom.isspace():
            yield offset, atom, cells
            continue
        for piece in chop_cells(atom, width):
            yield offset, piece, cell_len(piece)
            offset += len(piece)


def fold_spans(text: str, width: int) -> list[tuple[int, int]]:
    """Start and end of each row of a text that is broken where a row is full, as a terminal does."""
    spans = []
    start = 0
    for piece in chop_cells(text, max(width, 1)):
        spans.append((start, start + len(piece)))
        start += len(piece)
    return spans or [(0, 0)]


def cut(text: Text, spans: list[tuple[int, int]]) -> list[Text]:
    """The parts of a styled text that the spans name."""
    offsets = [offset for span in spans for offset in span]
    return list(text.divide(offsets))[1::2]


def make_row(prefix: str, text: Text, has_color: bool) -> Row:
    """One row as it is written; styles end with the row."""
    written = [prefix]
    for part, style, _ in text.render(_STYLES):
        shown = style if has_color or style is None else style.without_color
        written.append(shown.render(part, color_system=ColorSystem.STANDARD) if shown else part)
    return Row("".join(written), cell_len(prefix) + cell_len(text.plain))


BLANK = Row("", 0)
BOLD, DIM, RED = "1", "2", "31"
TAB = 4

_SGR = re.compile(r"\x1b\[[0-9;]*m")


@dataclass(frozen=True, slots=True)
class RowStyle:
    """A style by its SGR number, for whole rows or only for the marks of the first row and of the others."""

    style: str = ""
    first: str = ""
    rest: str = ""
    is_for_marks: bool = False


PLAIN = RowStyle()


@dataclass(frozen=True, slots=True)
class RowLayout:
    """Makes rows for a number of columns, with color or without any escape sequence."""

    columns: int
    has_color: bool = True

    def row(self, text: str, style: RowStyle = PLAIN) -> Row:
        """One row. The text is not wrapped."""
        return self._row(style.first, text, style)

    def rows(self, text: str, style: RowStyle = PLAIN) -> list[Row]:
        """The rows of a sanitized text, which may have several lines."""
        text = text.expandtabs(TAB)
        marks = chain([style.first], repeat(style.rest))
        return [
            self._row(mark, text[start:end], style)
            for mark, (start, end) in zip(marks, self.spans(text, style), strict=False)
        ]

    def spans(self, text: str, style: RowStyle = PLAIN) -> list[tuple[int, int]]:
        """Where each row of a text without tabs starts and ends."""
        width = max(MIN_WIDTH, self.columns - cell_len(style.first))
        hang = cell_len(style.rest) - cell_len(style.first)
        return row_spans(text, width, max(0, min(hang, width - MIN_WIDTH)))

    def plain(self, row: Row) -> Row:
        """A row that was styled elsewhere; without color its styles are removed."""
        return row if self.has_color else Row(_SGR.sub("", row.written), row.cells)

    def _row(self, mark: str, text: str, style: RowStyle) -> Row:
        written = mark + text
        cells = cell_len(written)
        if self.has_color and style.style and text:
            styled, plain = (mark, text) if style.is_for_marks else (written, "")
            written = f"\x1b[{style.style}m{styled}\x1b[0m{plain}"
        return Row(written, cells)
