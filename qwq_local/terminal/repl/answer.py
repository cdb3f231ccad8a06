"""An answer while it streams: pieces of Markdown in; rows to commit and rows that live out."""

from __future__ import annotations

from collections.abc import Callable

from qwq_local.terminal.layout import Row
from qwq_local.terminal.markdown import MarkdownRows
from qwq_local.terminal.repl.committed import with_gap
from qwq_local.terminal.repl.rows import BLANK, Paper

HELD_ROWS = 2

LaidOut = Callable[[Paper], list[Row]]
"""Something that was said, laid out for the width that the window has by then."""


class AnswerRows:
    """One answer, below a blank row. What is said meanwhile is held: it would stand amid a block."""

    def __init__(self, has_color: bool) -> None:
        self._pieces: list[str] = []
        self._rows = MarkdownRows(has_color)
        self._held: list[LaidOut] = []
        self._is_begun = False

    def feed(self, text: str) -> None:
        """Take the next piece; it is read when somebody looks."""
        self._pieces.append(text)

    @property
    def has_held(self) -> bool:
        """Whether something is committed below the answer."""
        return bool(self._held)

    def hold(self, said: LaidOut) -> None:
        """Commit this below the answer; until then the last of its rows live there."""
        self._held.append(said)

    def take(self, paper: Paper, limit: int) -> tuple[list[Row], list[Row]]:
        """The rows to commit now, and at most `limit` that live: of the answer, and of what is held."""
        self._read()
        held = _laid_out(self._held[-HELD_ROWS:], paper)[-HELD_ROWS:][: limit // 3]
        final, live = self._rows.take(paper.columns, limit - len(held))
        return self._apart(final, live, paper), [*map(paper.plain, live), *held]

    def close(self, paper: Paper) -> list[Row]:
        """The rows that are left, and what was held."""
        self._read()
        left = self._apart(self._rows.close(paper.columns), [], paper)
        return left + with_gap(_laid_out(self._held, paper))

    def _read(self) -> None:
        if self._pieces:
            self._rows.feed("".join(self._pieces))
            self._pieces.clear()

    def _apart(self, final: list[Row], live: list[Row], paper: Paper) -> list[Row]:
        rows = [paper.plain(row) for row in final]
        if self._is_begun or not (rows or live):
            return rows
        self._is_begun = True
        return [BLANK, *rows]


def _laid_out(held: list[LaidOut], paper: Paper) -> list[Row]:
    return [row for rows in held for row in rows(paper)]
