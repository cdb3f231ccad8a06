"""pyte's terminal with an alternate screen, and with rows that scroll out of a shrinking window."""

from __future__ import annotations

from typing import Any

import pyte
from wcwidth import wcswidth


class Emulator(pyte.HistoryScreen):
    """A screen with scrollback. `is_alternate` while a program has the alternate screen.

    `n_overflows` counts the texts that were written beyond the right edge: they were wrapped or cut there.
    """

    is_alternate = False
    n_overflows = 0

    def draw(self, data: str) -> None:
        """Write a text at the cursor."""
        self.n_overflows += self.cursor.x + max(wcswidth(data), 0) > self.columns
        super().draw(data)

    def set_mode(self, *modes: int, **kwargs: Any) -> None:
        """Enter the alternate screen if the mode says so."""
        super().set_mode(*modes, **kwargs)
        if kwargs.get("private") and 1049 in modes and not self.is_alternate:
            self.is_alternate = True
            self._main = ({y: dict(row) for y, row in self.buffer.items()}, self.cursor.x, self.cursor.y)
            self.erase_in_display(2)

    def reset_mode(self, *modes: int, **kwargs: Any) -> None:
        """Leave the alternate screen and restore the main one."""
        super().reset_mode(*modes, **kwargs)
        if kwargs.get("private") and 1049 in modes and self.is_alternate:
            self.is_alternate = False
            rows, x, y = self._main
            self.buffer.clear()
            for number, row in rows.items():
                self.buffer[number].update(row)
            self.cursor.x, self.cursor.y = min(x, self.columns - 1), min(y, self.lines - 1)
            self.dirty.update(range(self.lines))

    def index(self) -> None:
        """Move down; what scrolls out of the alternate screen is gone."""
        if not self.is_alternate:
            super().index()
        else:
            pyte.Screen.index(self)

    def resize(self, lines: int | None = None, columns: int | None = None) -> None:
        """Change the size. Nothing is wrapped again; rows above a cursor that has no room scroll out."""
        while lines and lines < self.lines and self.cursor.y >= lines:
            self.history.top.append(self.buffer[0])
            for y in range(self.lines - 1):
                self.buffer[y] = self.buffer[y + 1]
            self.buffer.pop(self.lines - 1, None)
            self.cursor.y -= 1
            # pyte itself would cut rows from the top, wherever the cursor is.
            self.lines -= 1
        while lines and lines < self.lines:
            self.buffer.pop(self.lines - 1, None)
            self.lines -= 1
        super().resize(lines, columns)
