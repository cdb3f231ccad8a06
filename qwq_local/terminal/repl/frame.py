"""What the view hands to whoever owns the terminal. Knows no events and no terminal."""

from __future__ import annotations

from dataclasses import dataclass

from qwq_local.terminal.layout import Row


@dataclass(frozen=True, slots=True)
class Frame:
    """Rows to write above for good, and those to show until the next frame: live ones and the status line.

    Live rows fit the window; a final row of code may be wider and is left to the terminal to wrap.
    """

    final: tuple[Row, ...] = ()
    live: tuple[Row, ...] = ()
    status: tuple[str, ...] = ()
