"""The rows at the bottom of the window that may still change.

A region knows the rows it drew last. For the next frame it rewrites the rows that changed, or puts final rows
above all of them. It never touches anything further up: no alternate screen, no scroll region, no clearing of
the screen, so scrollback, selection and multiplexers work as with plain output. After a resize it counts how
many rows the terminal made of its own rows and erases exactly these.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from rich.cells import cell_len, chop_cells

from qwq_local.terminal.layout import Row
from qwq_local.terminal.output import Output

_WRAP_OFF, _WRAP_ON = "\x1b[?7l", "\x1b[?7h"
_HIDE, _SHOW = "\x1b[?25l", "\x1b[?25h"
_ERASE_LINE, _ERASE_BELOW = "\x1b[K", "\x1b[J"
# tmux treats erasing from the window's first cell as clearing the screen, and moves the old text to the
# scrollback. So the first row is erased by itself, and the others from the second row on.
_ERASE_FROM_HERE = f"\x1b7{_ERASE_LINE}\x1b[B{_ERASE_BELOW}\x1b8"
_SEQUENCE = re.compile(r"\x1b\[[0-9;]*m|\x1b\]8;[^\x1b\x07]*(?:\x1b\\|\x07)")


@dataclass(frozen=True, slots=True)
class Cursor:
    """A place among the rows, counted from 0."""

    x: int
    y: int


class Region:
    """The rows that are drawn at the bottom, and how to redraw them."""

    def __init__(self, output: Output) -> None:
        self._output = output
        self._drawn: list[Row] = []
        self._cursor = Cursor(0, 0)
        self._columns = 0
        self.is_doubtful = False  # the window changed during the last frame: its rows may be narrower

    def frame(self, final: Sequence[Row], rows: Sequence[Row], cursor: Cursor) -> str:
        """The text that writes final rows above the others and puts the cursor in its place among these."""
        columns, window_rows = self._output.size()
        rows, cursor = _fitting(rows, cursor, window_rows)
        cursor = Cursor(min(cursor.x, columns - 1), cursor.y)
        if not final and columns == self._columns and self._drawn:
            text = self._changes(rows)
            if not text and cursor == self._cursor:
                return ""
            text += _move(self._cursor.y if not text else len(rows) - 1, cursor)
        else:
            text = self._rewind() + _ERASE_FROM_HERE
            text += "".join(f"{row.written}\r\n" for row in final)
            text += _WRAP_OFF + "\r\n".join(row.written for row in rows) + _WRAP_ON
            text += _move(len(rows) - 1, cursor)
        self._drawn, self._cursor, self._columns = list(rows), cursor, columns
        self.is_doubtful = False
        return _HIDE + text + _SHOW

    def erase(self) -> str:
        """The text to write to erase all rows; the cursor is then where the first row was."""
        text = self._rewind() + _ERASE_FROM_HERE if self._drawn else ""
        self.forget()
        return text

    def forget(self) -> None:
        """Forget the drawn rows: the next frame begins where the cursor is."""
        self._drawn, self._cursor, self._columns = [], Cursor(0, 0), 0
        self.is_doubtful = False

    def _changes(self, rows: Sequence[Row]) -> str:
        """Redraw each row that differs; the cursor ends in the last row."""
        drawn = self._drawn
        changed = [y for y, row in enumerate(rows) if y >= len(drawn) or row != drawn[y]]
        if not changed and len(rows) == len(drawn):
            return ""
        parts, y = [_WRAP_OFF], self._cursor.y
        for row in changed:
            if row >= len(drawn):
                # Only a new line makes the window scroll; moving down stops at its last row.
                parts += [_move(y, Cursor(0, row - 1)), "\r\n"]
            else:
                parts.append(_move(y, Cursor(0, row)))
            parts += [_ERASE_LINE, rows[row].written]
            y = row
        parts.append(_WRAP_ON)
        if len(rows) < len(drawn):
            parts += [_move(y, Cursor(0, len(rows))), _ERASE_BELOW]
            y = len(rows)
        return "".join(parts) + _move(y, Cursor(0, len(rows) - 1))

    def _rewind(self) -> str:
        """Move to the start of the first row."""
        columns, window_rows = self._output.size()
        above = self._drawn[: self._cursor.y]
        if self.is_doubtful or not self._output.reflows or columns >= self._columns:
            up = len(above)
        else:
            # The terminal has wrapped its rows again.
            up = sum(max(1, len(chop_cells(_SEQUENCE.sub("", row.written), columns))) for row in above)
            if self._drawn:
                up += _rows_before(self._drawn[self._cursor.y].written, self._cursor.x, columns)
        up = min(up, window_rows - 1)
        return f"\r\x1b[{up}A" if up else "\r"


def _fitting(rows: Sequence[Row], cursor: Cursor, window_rows: int) -> tuple[Sequence[Row], Cursor]:
    """As many rows as the window has: the last ones, but always with the cursor's."""
    left_out = max(0, len(rows) - max(window_rows, 1))
    first = min(left_out, cursor.y)
    return rows[first : first + max(window_rows, 1)], Cursor(cursor.x, cursor.y - first)


def _move(y: int, to: Cursor) -> str:
    """Move from row `y` to a place."""
    down = to.y - y
    text = "\r" + (f"\x1b[{down}B" if down > 0 else f"\x1b[{-down}A" if down < 0 else "")
    return text + (f"\x1b[{to.x}C" if to.x else "")


def _rows_before(written: str, x: int, columns: int) -> int:
    """The index of the wrapped row that holds cell `x`."""
    cells = 0
    pieces = chop_cells(_SEQUENCE.sub("", written), columns)
    for index, piece in enumerate(pieces):
        cells += cell_len(piece)
        if x < cells:
            return index
    return max(0, len(pieces) - 1) + (x - cells) // columns if pieces else x // columns
