"""A terminal with the real `qwq chat` and the miniature in it, and checks of its screen."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.command import environment
from tests.terminal.repl_terminal import ENTER, NO_REFLOW, Chat

SIZES = ((80, 24), (200, 50), (20, 24))
at_every_size = pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")

COUNT = "How many r's are in the word strawberry?"
COUNTED = r"""There are 3 r's in "strawberry": \boxed{3}"""
CERTAIN = ("--seed", "1", "--set", "temperature=0")


def bare(text: str) -> str:
    """The text without white space, so that line breaks do not matter."""
    return "".join(text.split())


class Terminal(Chat):
    """`qwq chat` on a pseudo-terminal. Its text is read again only after new output."""

    _looked_at = 0, 0, 0
    _visible = _text = ""

    @property
    def visible(self) -> str:
        """The screen alone, trailing blanks cut."""
        self._look()
        return self._visible

    @property
    def text(self) -> str:
        """Scrollback and screen, trailing blanks cut."""
        self._look()
        return self._text

    def _look(self) -> None:
        now = len(self.raw), self.columns, self.rows
        if now != self._looked_at:
            self._looked_at, self._visible, self._text = now, super().visible, super().text

    @property
    def above(self) -> str:
        """The text above the input line, scrollback included, its rows joined."""
        rows = self.text.split("\n")
        ends = [y for y, row in enumerate(rows) if row.startswith(("❯", "steer ❯"))]
        return " ".join(" ".join(rows[: ends[-1] if ends else len(rows)]).split())

    @property
    def said(self) -> str:
        """The text after the last entry, its rows joined."""
        return self.above.rpartition("❯ ")[2]

    @property
    def is_done(self) -> bool:
        """Whether no turn runs and the input line is empty."""
        return self.input_rows == ["❯"] and self.status.startswith("QwQ")

    @property
    def is_whole(self) -> bool:
        """Whether the screen is right while the chat waits for input.

        One empty input line with the cursor in it, a status line below it that fits, and nothing left
        anywhere of earlier ones, nor of live rows; no row was ever wider than the window.
        """
        rows = self.text.split("\n")
        cursor = self.screen.cursor
        return (
            rows[-2:-1] == ["❯"]
            and 0 < len(rows[-1]) < self.columns
            and rows.count("❯") == rows.count(rows[-1]) == 1
            and (cursor.x, cursor.y) == (2, self.visible.count("\n") - 1)
            and not (cursor.hidden or self.screen.is_alternate)
            and not self.screen.n_overflows
            and not any(row.startswith(("▾", "⋯", "search:", "steer ❯")) for row in rows)
        )

    def does(self, line: str, *expected: str) -> str:
        """Enter a command and wait for all expected texts, however they are wrapped; returns its output."""
        echo = bare(f"❯ {line}")
        before = bare(self.above).count(echo)
        self.type(line + ENTER)

        def has_done() -> bool:
            above = bare(self.above)
            said = above.rpartition(echo)[2]
            return above.count(echo) > before and all(bare(each) in said for each in expected)

        self.wait_for(lambda: self.is_whole and has_done())
        return self._after(echo)

    def asks(self, line: str, *expected: str) -> str:
        """Enter a line that the model answers; returns the text shown for the turn."""
        before = self.above.count("▸ thought")
        self.type(line + ENTER)
        self.turn_is_over(before + 1)
        self.wait_for(lambda: self.is_whole and all(bare(each) in bare(self.said) for each in expected))
        return self.said

    def turn_is_over(self, n_thoughts: int) -> None:
        """Wait until this many thoughts are folded and nothing runs."""
        self.wait_for(lambda: self.above.count("▸ thought") == n_thoughts and self.is_done)

    def thinks(self, line: str) -> None:
        """Enter a line and wait until the model thinks."""
        self.type(line + ENTER)
        self.wait_for(lambda: self.status.startswith("thinking"))

    def has_typed(self, text: str) -> None:
        """Wait until the input line has this text, however it is wrapped."""
        self.wait_for(lambda: bare("".join(self.input_rows)) == bare(f"❯ {text}"))

    def reads(self, *expected: str) -> None:
        """Wait until the pager shows all this, however it is wrapped."""
        self.wait_for(
            lambda: self.screen.is_alternate and all(bare(each) in bare(self.visible) for each in expected)
        )

    def is_back(self) -> None:
        """Wait until the pager has closed and the screen is right."""
        self.wait_for(lambda: not self.screen.is_alternate and self.is_whole)

    def leaves(self, command: str = "/exit") -> None:
        """Leave by a command and check that the terminal is restored."""
        self.type(command + ENTER)
        assert self.read_to_end() == 0
        assert self.visible.endswith(f"❯ {command}")
        assert not self.screen.cursor.hidden
        assert not self.screen.is_alternate
        assert self.raw.rindex(b"\x1b[?2004l") > self.raw.rindex(b"\x1b[?2004h")

    def _after(self, echo: str) -> str:
        """The text above the input line from the end of the last echo on."""
        above = self.above
        place = bare(above).rindex(echo) + len(echo)
        ends = [index for index, character in enumerate(above, 1) if not character.isspace()]
        return above[ends[place - 1] :].strip()


@contextmanager
def starting(
    cache: Path,
    data: Path,
    *flags: str,
    size: tuple[int, int] = (80, 24),
    stdout: int | None = None,
    **variables: str,
) -> Iterator[Terminal]:
    """A started `qwq chat`, nothing read from it yet. Tests may share its cache, not its history."""
    no_display = {"DISPLAY": "", "WAYLAND_DISPLAY": "", "TMUX": ""}
    changes = {**NO_REFLOW, **no_display, "QWQ_DATA_DIR": str(data), **variables}
    arguments = ["chat", "--model", "miniature", *flags]
    chat = Terminal(arguments, environment(cache, **changes), *size, stdout=stdout)
    with chat:
        yield chat


@contextmanager
def chatting(
    cache: Path, data: Path, *flags: str, size: tuple[int, int] = (80, 24), **variables: str
) -> Iterator[Terminal]:
    """A chat that is ready for input."""
    with starting(cache, data, *flags, size=size, stdout=None, **variables) as chat:
        chat.wait_for(lambda: chat.input_rows == ["❯"] and bool(chat.status))
        yield chat


def rows(data: Path, query: str) -> list[tuple[Any, ...]]:
    """Rows of the history, read with SQLite alone."""
    with closing(sqlite3.connect(data / "history.sqlite3")) as database:
        return database.execute(query).fetchall()


def last_turn(data: Path, columns: str) -> tuple[Any, ...]:
    """Columns of the turn that began last."""
    turns = "SELECT turns.*, thinking, answer FROM turns JOIN turn_texts ON turn_texts.id = turns.id"
    (row,) = rows(data, f"SELECT {columns} FROM ({turns}) ORDER BY id DESC LIMIT 1")
    return row
