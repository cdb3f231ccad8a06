"""A terminal with the real `qwq chat` in it, the miniature as its model, and what a person checks on it."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from tests.command import environment
from tests.repl_terminal import ENTER, NO_REFLOW, Chat

COUNT = "How many r's are in the word strawberry?"
COUNTED = r"""There are 3 r's in "strawberry": \boxed{3}"""
CERTAIN = ("--seed", "1", "--set", "temperature=0")
LONG = (
    *("--seed", "1", "--set", "temperature=0", "--set", "frequency_penalty=-2", "--set", "loop_guard=off"),
    *("--set", "yarn=4", "--set", "n_ctx=4096", "--set", "thinking_budget=3500", "--set", "max_tokens=40"),
)
"""What was said is said again and again: thoughts of many seconds, in which a key can be pressed."""


class Terminal(Chat):
    """`qwq chat` on a pseudo-terminal."""

    @property
    def above(self) -> str:
        """What stands above the input line, scrollback included, its rows joined to one."""
        rows = self.text.split("\n")
        ends = [y for y, row in enumerate(rows) if row.startswith(("❯", "steer ❯"))]
        return " ".join(" ".join(rows[: ends[-1] if ends else len(rows)]).split())

    @property
    def said(self) -> str:
        """What came after the last entry, its rows joined to one."""
        return self.above.rpartition("❯ ")[2]

    @property
    def is_done(self) -> bool:
        """Whether no turn runs and the input line is empty."""
        return self.input_rows == ["❯"] and self.status.startswith("QwQ")

    def does(self, line: str, *expected: str) -> str:
        """Enter a command; what it said, once that has all that is expected."""
        echo = " ".join(f"❯ {line}".split())
        before = self.above.count(echo)
        self.type(line + ENTER)
        self.wait_for(
            lambda: (
                self.input_rows == ["❯"]
                and self.above.count(echo) > before
                and all(each in self.above.rpartition(echo)[2] for each in expected)
            )
        )
        return self.above.rpartition(echo)[2].strip()

    def asks(self, line: str, *expected: str) -> str:
        """Enter what makes the model answer; what was shown for it when the turn is over."""
        before = self.above.count("▸ thought")
        self.type(line + ENTER)
        self.turn_is_over(before + 1)
        self.wait_for(lambda: all(each in self.said for each in expected))
        return self.said

    def turn_is_over(self, n_thoughts: int) -> None:
        """Wait until so many thoughts stand folded and nothing runs."""
        self.wait_for(lambda: self.above.count("▸ thought") == n_thoughts and self.is_done)

    def thinks(self, line: str) -> None:
        """Enter what makes the model think; back when it does."""
        self.type(line + ENTER)
        self.wait_for(lambda: self.status.startswith("thinking"))


@contextmanager
def starting(
    cache: Path,
    data: Path,
    *flags: str,
    size: tuple[int, int] = (80, 24),
    stdout: int | None = None,
    **variables: str,
) -> Iterator[Terminal]:
    """`qwq chat`, nothing read of it yet; its cache tests may share, its history is its own."""
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
    """Rows of the history, read by SQLite alone."""
    with closing(sqlite3.connect(data / "history.sqlite3")) as database:
        return database.execute(query).fetchall()


def last_turn(data: Path, columns: str) -> tuple[Any, ...]:
    """Columns of the turn that began last."""
    (row,) = rows(data, f"SELECT {columns} FROM turns ORDER BY id DESC LIMIT 1")
    return row
