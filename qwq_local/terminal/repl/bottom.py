"""What stands around the input line: the live rows and waiting prompts above it, the status line below.

Comes in: frames of the turn, the waiting prompts, hints that last for moments. Goes out: rows for the width
as it is. Knows no prompt_toolkit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from qwq_local.terminal.layout import Row
from qwq_local.terminal.output import Output
from qwq_local.terminal.progress import Clock
from qwq_local.terminal.repl.rows import DIM, Look, Paper
from qwq_local.terminal.repl.waiting import Waiting
from qwq_local.terminal.sanitize import one_line

HINT_S = 2.0
"""How long a hint stands in place of the status line."""


class Bottom:
    """The rows above and below the input line; `changed` is told for how long a hint stands."""

    def __init__(
        self, output: Output, clock: Clock, waiting: Waiting, changed: Callable[[float], None]
    ) -> None:
        self.live: Sequence[Row] = ()
        self.status: Sequence[str] = ()
        self._output = output
        self._clock = clock
        self._waiting = waiting
        self._changed = changed
        self._hint = ""
        self._hint_until = 0.0

    def hint(self, text: str, seconds: float = HINT_S) -> None:
        """Show a text in place of the status line's last row, for so long."""
        self._hint, self._hint_until = text, self._clock() + seconds
        self._changed(seconds)

    def end_hint(self) -> None:
        """Show the status line again."""
        self._hint_until = 0.0

    def above(self) -> list[Row]:
        """The rows above the input line."""
        columns, _ = self._output.size()
        return [*self.live, *self._waiting.rows(columns)]

    def below(self) -> list[Row]:
        """The rows of the status line; none where there is nothing to say."""
        columns, _ = self._output.size()
        lines = self.status
        if self._clock() < self._hint_until:
            lines = [*lines[:-1], self._hint]
        paper, look = Paper(columns, self._output.has_color), Look(DIM)
        return [paper.row(one_line(line, columns - 1), look) for line in lines if line]
