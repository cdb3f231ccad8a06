"""The few rows at the bottom that may still change; everything above them is written once.

Comes in: rows that are final and rows that are not. Goes out: one write per frame, which moves up over the
live rows at most. The alternate screen, scroll regions and clearing of the screen are never used, so that
scrollback, selection and multiplexers work as with plain output.
"""

from __future__ import annotations

from collections.abc import Sequence

from qwq_local.terminal.layout import Row
from qwq_local.terminal.output import Output

# Terminals disagree about the width of joined emoji: without wrapping, a live row stays one row.
_WRAP_OFF, _WRAP_ON = "\x1b[?7l", "\x1b[?7h"
_ERASE_BELOW = "\x1b[J"


class LiveRegion:
    """Draws over its own rows; between frames the cursor stands at the end of the last one."""

    def __init__(self, output: Output) -> None:
        self._output = output
        self._drawn: list[Row] = []
        self._columns = 0

    def frame(self, final: Sequence[Row], live: Sequence[Row]) -> None:
        """Write the final rows above the live ones; only rows that changed are drawn again."""
        columns, window_rows = self._output.size()
        same = 0
        if not final and columns == self._columns:
            if list(live) == self._drawn:
                return
            same = _common_prefix(self._drawn, live)
        text = self._rewind(same, columns, window_rows)
        text += "".join(f"{row.written}\n" for row in final)
        if live:
            text += _WRAP_OFF + "\n".join(row.written for row in live[same:]) + _WRAP_ON
        self._drawn, self._columns = list(live), columns
        self._output.write(text)

    def erase(self) -> None:
        """Take the live rows away; the next frame draws them again below whatever was written meanwhile."""
        self.frame((), ())

    def _rewind(self, kept: int, columns: int, window_rows: int) -> str:
        """Move to the start of the first row that changed and erase from there on."""
        height = sum(self._rows_on_screen(row, columns) for row in self._drawn[kept:])
        if height == 0:
            return ""
        up = min(height, window_rows) - 1
        return (f"\r\x1b[{up}A" if up else "\r") + _ERASE_BELOW

    def _rows_on_screen(self, row: Row, columns: int) -> int:
        """How many rows a drawn row takes now: more than one where the window got narrower and reflowed."""
        if not self._output.reflows or columns >= self._columns:
            return 1
        return max(1, -(-row.cells // columns))


def _common_prefix(drawn: Sequence[Row], live: Sequence[Row]) -> int:
    """Leading rows that stay; never all of them, so that the cursor has a row to return to."""
    same = 0
    while same < min(len(drawn), len(live)) - 1 and drawn[same] == live[same]:
        same += 1
    return same
