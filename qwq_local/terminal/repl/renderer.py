"""Draws the input line between live rows above it and the status line below it, as one region.

While a model writes, the input line is not laid out again: its rows are kept from the last key.
prompt_toolkit's own renderer redraws cell by cell, cannot put rows above itself without erasing itself
first, and leaves old rows behind after a resize.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Sequence
from typing import Any

from prompt_toolkit.application import Application
from prompt_toolkit.data_structures import Size
from prompt_toolkit.layout import Layout
from prompt_toolkit.layout.mouse_handlers import MouseHandlers
from prompt_toolkit.layout.screen import Screen, WritePosition
from prompt_toolkit.output.vt100 import FG_ANSI_COLORS, Vt100_Output
from prompt_toolkit.renderer import Renderer
from prompt_toolkit.styles import Attrs, BaseStyle

from qwq_local.terminal.layout import DIM, Row, RowLayout, RowStyle
from qwq_local.terminal.live_region import Cursor, Region
from qwq_local.terminal.output import Output
from qwq_local.terminal.progress import Clock
from qwq_local.terminal.sanitizer import one_line

HINT_S = 2.0
"""Seconds for which a hint takes the place of the status line."""


class BottomArea:
    """The rows above and below the input line. `changed` is called with the seconds that a hint lasts."""

    def __init__(
        self,
        output: Output,
        clock: Clock,
        waiting_rows: Callable[[int], list[Row]],
        changed: Callable[[float], None],
    ) -> None:
        self.live: Sequence[Row] = ()
        self.status: Sequence[str] = ()
        self._output = output
        self._clock = clock
        self._waiting_rows = waiting_rows
        self._changed = changed
        self._hint = ""
        self._hint_until = 0.0

    def hint(self, text: str, seconds: float = HINT_S) -> None:
        """Show a text in place of the last row of the status line."""
        self._hint, self._hint_until = text, self._clock() + seconds
        self._changed(seconds)

    def end_hint(self) -> None:
        """Show the status line again."""
        self._hint_until = 0.0

    def above(self) -> list[Row]:
        """The rows above the input line."""
        columns, _ = self._output.size()
        return [*self.live, *self._waiting_rows(columns)]

    def below(self) -> list[Row]:
        """The rows of the status line."""
        columns, _ = self._output.size()
        lines = self.status
        if self._clock() < self._hint_until:
            lines = [*lines[:-1], self._hint]
        layout, look = RowLayout(columns, self._output.has_color), RowStyle(DIM)
        return [layout.row(one_line(line, columns - 1), look) for line in lines if line]


SETTLE_S = 0.05
"""Seconds without a resize before anything is drawn: then the terminal has wrapped the old rows."""

_PLAIN = "\x1b[0m"


class QuietOutput(Vt100_Output):
    """prompt_toolkit's output. It sends no queries and survives the end of the terminal."""

    def __init__(self, output: Output, term: str) -> None:
        def size() -> Size:
            columns, rows = output.size()
            return Size(rows=rows, columns=columns)

        super().__init__(output.stream, size, term=term, enable_bell=False, enable_cpr=False)

    def send(self, sequence: str) -> None:
        """Write a sequence to the terminal."""
        self.write_raw(sequence)
        self.flush()

    def flush(self) -> None:
        """Write the collected text; does nothing when the terminal is gone."""
        with contextlib.suppress(OSError):
            super().flush()


class InlineRenderer(Renderer):
    """Replaces the application's renderer. `take_frame` updates the bottom and returns final rows."""

    def __init__(
        self,
        style: BaseStyle,
        quiet: QuietOutput,
        output: Output,
        bottom: BottomArea,
        take_frame: Callable[[], Sequence[Row]],
    ) -> None:
        self._region = Region(output)
        self._rows: Sequence[Row] = (Row("", 0),)
        self._cursor = Cursor(0, 0)
        self._settled_at = 0.0
        self._attrs: dict[str, tuple[str, bool]] = {}
        super().__init__(style, quiet)
        self._terminal = output
        self._bottom = bottom
        self._take_frame = take_frame
        self._columns = 0

    @property
    def is_ready(self) -> bool:
        """Whether frames can be drawn: no resize is in progress, and the input is laid out for this width."""
        return time.monotonic() >= self._settled_at and self._columns == self._terminal.size()[0]

    def render(self, app: Application[Any], layout: Layout, is_done: bool = False) -> None:
        """Lay out the input and draw everything."""
        if is_done:
            return
        if time.monotonic() < self._settled_at:
            asyncio.get_running_loop().call_later(SETTLE_S, app.invalidate)
            return
        if not self._bracketed_paste_enabled:
            self.output.enable_bracketed_paste()
            self.output.reset_cursor_key_mode()
            self._bracketed_paste_enabled = True
        columns, window_rows = self._terminal.size()
        screen = Screen()
        height = min(layout.container.preferred_height(columns, window_rows).preferred, window_rows)
        place = WritePosition(xpos=0, ypos=0, width=columns, height=height)
        layout.container.write_to_screen(screen, MouseHandlers(), place, "", False, None)
        layout.visible_windows = screen.visible_windows
        self._rows = [self._row(screen, y, columns) for y in range(height)]
        at = screen.get_cursor_position(layout.current_window)
        self._cursor = Cursor(at.x, min(at.y, max(0, height - 1)))
        # The live rows were made for another width.
        final = self._take_frame() if columns != self._columns else ()
        self._columns = columns
        self.draw(final)

    def draw(self, final: Sequence[Row] = ()) -> None:
        """Put final rows above everything and redraw changed rows; the input keeps its layout."""
        size = self._terminal.size()
        above = self._bottom.above()
        rows = [*above, *self._rows, *self._bottom.below()]
        self._write(self._region.frame(final, rows, Cursor(self._cursor.x, len(above) + self._cursor.y)))
        if self._terminal.size() != size:
            self._region.is_doubtful = True

    def erase(self, leave_alternate_screen: bool = True) -> None:
        """Erase everything; after a resize only wait until the size is stable."""
        if not leave_alternate_screen:
            # prompt_toolkit calls it this way only for a resize, and redraws right after.
            self._settled_at = time.monotonic() + SETTLE_S
            return
        self._write(self._region.erase())
        self.reset()

    def clear(self) -> None:
        """Erase everything, so that it is drawn again; the screen is not cleared."""
        self._write(self._region.erase())

    def reset(self, _scroll: bool = False, leave_alternate_screen: bool = True) -> None:
        """Forget what was drawn: the next frame begins where the cursor is."""
        super().reset(_scroll, leave_alternate_screen)
        self._region.forget()

    def _write(self, text: str) -> None:
        if text:
            self.output.write_raw(text)
            self.output.flush()

    def _row(self, screen: Screen, y: int, columns: int) -> Row:
        """One row of prompt_toolkit's screen as it is written, without blanks at its end."""
        cells = screen.data_buffer[y]
        seen = (x for x, char in cells.items() if char.char != " " or self._code(char.style)[1])
        end = max(seen, default=-1) + 1
        parts: list[str] = []
        style, width = "", 0
        for x in range(min(end, columns)):
            char = cells[x]
            code = self._code(char.style)[0]
            if code != style:
                parts.append(f"{_PLAIN}{code}" if style else code)
                style = code
            parts.append(char.char)
            width += char.width
        return Row("".join(parts) + (_PLAIN if style else ""), width)

    def _code(self, style: str) -> tuple[str, bool]:
        """The sequence that begins a style, and whether it shows on a blank."""
        known = self._attrs.get(style)
        if known is None:
            attrs = self.style.get_attrs_for_style_str(style)
            known = self._attrs[style] = (
                _code(attrs, self._terminal.has_color),
                bool(attrs.reverse or attrs.underline),
            )
        return known


def _code(attrs: Attrs, has_color: bool) -> str:
    """The sequence for the attributes that our styles use: the terminal's own colors, no background."""
    styles = {"1": attrs.bold, "2": attrs.dim, "3": attrs.italic, "4": attrs.underline, "7": attrs.reverse}
    codes = [code for code, is_on in styles.items() if is_on]
    if has_color and attrs.color in FG_ANSI_COLORS:
        codes.append(str(FG_ANSI_COLORS[attrs.color]))
    return f"\x1b[{';'.join(codes)}m" if codes else ""
