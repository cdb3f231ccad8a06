"""A thought as it is shown while it streams: not at all, as one sentence, as its last rows, or in full."""

from __future__ import annotations

from qwq_local.chat.events import ThinkView
from qwq_local.terminal.layout import Row
from qwq_local.terminal.repl.rows import BLANK, DIM, Look, Paper
from qwq_local.terminal.repl.thought import Thought
from qwq_local.terminal.sanitize import one_line

_OPEN = Look(DIM, "▾ ", "  ")


class ThoughtView:
    """Shows thought `number`. Shown in full once, it stays so: what is committed cannot be folded."""

    def __init__(self, number: int, view: ThinkView) -> None:
        self.thought = Thought()
        self.is_full = view is ThinkView.FULL
        self._number = number
        self._view = view
        self._is_begun = False

    def choose(self, view: ThinkView) -> None:
        """Show it that way from now on."""
        self._view = view
        self.is_full = self.is_full or view is ThinkView.FULL

    def take(self, paper: Paper, limit: int) -> tuple[list[Row], list[Row]]:
        """The rows to commit now, and at most `limit` rows that live."""
        if self.is_full:
            final, live = self.thought.take(paper)
            return self._apart(final, live), live[-limit:]
        if self._view is ThinkView.OFF:
            return [], []
        if self._view is ThinkView.EXCERPT:
            excerpt = self.thought.excerpt(paper.columns - 2)
            return [], [paper.row(excerpt or "thinking …", _OPEN)]
        rows = self.thought.tail(paper, max(1, limit - 1))
        name = f"thought {self._number} · thinking …"
        head = [
            paper.row(
                name if len(name) + 2 <= paper.columns else one_line("thinking …", paper.columns - 2), _OPEN
            )
        ]
        return [], [*head, *rows] if limit > 1 else rows or head

    def interrupt(self, paper: Paper) -> list[Row]:
        """All rows to commit before something else stands below: those of the open line too."""
        if not self.is_full:
            return []
        self.thought.end_line()
        final, _ = self.thought.take(paper)
        return self._apart(final, [])

    def _apart(self, final: list[Row], live: list[Row]) -> list[Row]:
        """The rows, the first ever below a blank one."""
        if self._is_begun or not (final or live):
            return final
        self._is_begun = True
        return [BLANK, *final]
