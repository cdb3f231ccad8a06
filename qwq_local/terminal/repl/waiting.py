"""Prompts that were entered while something ran: they wait their turn, and can be taken back.

Comes in: inputs as they stand in the input line. Goes out: the next one, and the rows that show them.
"""

from __future__ import annotations

from collections import deque

from qwq_local.terminal.layout import Row
from qwq_local.terminal.repl.paste import Pastes
from qwq_local.terminal.repl.rows import DIM, Look, Paper
from qwq_local.terminal.sanitize import one_line

MAX_ROWS = 3
"""Rows that the waiting prompts take at most."""


class Waiting:
    """The inputs that wait, first come first served."""

    def __init__(self, pastes: Pastes, has_color: bool) -> None:
        self._inputs: deque[str] = deque()
        self._pastes = pastes
        self._has_color = has_color

    def __len__(self) -> int:
        return len(self._inputs)

    def add(self, text: str) -> None:
        """Let an input wait behind the others."""
        self._inputs.append(text)

    def add_first(self, text: str) -> None:
        """Let an input wait before all others."""
        self._inputs.appendleft(text)

    def next(self) -> str | None:
        """The input whose turn it is, if any; it waits no longer."""
        return self._inputs.popleft() if self._inputs else None

    def take_back(self) -> str | None:
        """The input that came last, if any; it waits no longer."""
        return self._inputs.pop() if self._inputs else None

    def take_back_all(self) -> str:
        """All inputs with a blank line between them; none waits any longer."""
        text = "\n\n".join(self._inputs)
        self._inputs.clear()
        return text

    def rows(self, columns: int, most: int = MAX_ROWS) -> list[Row]:
        """One row for each of the first few, and a count of the others."""
        shown = list(self._inputs)
        left_out = 0
        if len(shown) > most:
            left_out = len(shown) - most + 1
            shown = shown[: most - 1]
        # The excerpt is of the start: no more of a long input is looked at.
        lines = [f"⋯ waiting: {self._pastes.shown(text[: 4 * columns])}" for text in shown]
        if left_out:
            lines.append(f"⋯ {left_out} more waiting" if shown else f"⋯ {left_out} waiting")
        paper = Paper(columns, self._has_color)
        return [paper.row(one_line(line, columns), Look(DIM)) for line in lines]
