"""A terminal with the REPL over a queued Talk, for tests of keys, pastes and resizes."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tests.command import ROOT, Terminal, environment

PROGRAM = (sys.executable, str(ROOT / "tests" / "terminal" / "queued_talk.py"))
NO_REFLOW = {"XTERM_VERSION": "XTerm(390)"}
"""The variables of a terminal like the emulator: it cuts rows and never wraps them again."""

ENTER, ESCAPE, UP, DOWN, RIGHT, BACKSPACE = "\r", "\x1b", "\x1b[A", "\x1b[B", "\x1b[C", "\x7f"
ALT_ENTER, ALT_F, TAB, CTRL_UNDERSCORE = "\x1b\r", "\x1bf", "\t", "\x1f"
PAGE_UP, PAGE_DOWN, HOME, END = "\x1b[5~", "\x1b[6~", "\x1b[H", "\x1b[F"


def ctrl(letter: str) -> str:
    """The key press of Ctrl and a letter."""
    return chr(ord(letter.upper()) - 64)


def pasted(text: str) -> str:
    """What a terminal sends for a pasted text."""
    return f"\x1b[200~{text}\x1b[201~"


class Chat(Terminal):
    """The REPL on a pseudo-terminal, and the calls of its Talk."""

    log: Path
    n_calls_before = n_turns_before = 0

    @property
    def calls(self) -> list[list[str]]:
        """The calls of the Talk since the test began: names and texts."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        return [json.loads(line) for line in lines[self.n_calls_before :]]

    @property
    def submitted(self) -> list[str]:
        """The lines submitted to the Talk so far."""
        return [call[1] for call in self.calls if call[0] == "submit"]

    @property
    def input_rows(self) -> list[str]:
        """The input line's rows on the screen, from the last prompt on, without the status line."""
        rows, _ = self._split()
        starts = [y for y, row in enumerate(rows) if row.startswith(("❯", "steer ❯"))]
        return rows[starts[-1] :] if starts else []

    @property
    def status(self) -> str:
        """The status line, its rows joined."""
        return " · ".join(self._split()[1])

    def _split(self) -> tuple[list[str], list[str]]:
        """The rows of the screen and those of the status line, of which there may be two while it thinks."""
        rows = self.visible.split("\n")
        n_last = 2 if rows[-2:][0].startswith("thinking ") else 1
        return rows[:-n_last], rows[-n_last:]

    def sees(self, text: str) -> None:
        """Wait until the text is on the screen."""
        self.wait_for(lambda: text in self.visible)

    def hinted(self, text: str) -> None:
        """Wait until the text has been on the screen: a hint may be gone before the test looks."""
        self.wait_for(lambda: text.encode() in self.raw)

    def has_input(self, *rows: str) -> None:
        """Wait until the input line has exactly these rows."""
        self.wait_for(lambda: self.input_rows == list(rows))

    def is_idle(self, n_turns: int) -> None:
        """Wait until this many turns of the test have ended and nothing runs."""
        n_tokens = 100 * (self.n_turns_before + n_turns)
        self.wait_for(lambda: f" ctx {n_tokens:,}/32,768" in self.status)

    def is_new(self) -> bool:
        """Clear the screen for another test; returns whether the chat is in its first state."""
        if self.process.poll() is not None or self.screen.is_alternate:
            return False
        self.screen.reset()
        self.type(ctrl("l"))
        self.wait_for(lambda: "❯" in self.visible and bool(self.status))
        if "^C" in self.status:
            self.type(ctrl("c"))
            self.wait_for(lambda: self.status.startswith("QwQ"))
        if self.input_rows != ["❯"] and self.status.startswith("QwQ"):
            self.type(ctrl("c"))
            self.has_input("❯")
        used = re.search(r"^QwQ.* ctx ([\d,]+)/", self.status)
        if self.input_rows != ["❯"] or used is None or (self.columns, self.rows) != (80, 24):
            return False
        self.screen.reset()
        self.type(ctrl("l"))
        self.has_input("❯")
        self.raw.clear()
        self.n_turns_before = int(used[1].replace(",", "")) // 100
        self.n_calls_before += len(self.calls)
        return True

    def hang_up(self) -> None:
        """Close the terminal, as closing its window does."""
        os.close(self._own)
        self._own = os.open(os.devnull, os.O_RDONLY)

    def leave(self) -> int:
        """Leave with Ctrl-D; the exit status."""
        self.type(ctrl("d"))
        return self.read_to_end()


class Shared:
    """One chat for many tests, replaced after a test that left it in another state."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._stack = ExitStack()
        self._chat: Chat | None = None

    def chat(self) -> Chat:
        """A chat in which nothing runs, with an empty screen and an empty line."""
        if self._chat is None or not self._chat.is_new():
            self.end()
            self._folder = self._folder / "again"
            self._folder.mkdir()
            self._chat = self._stack.enter_context(chatting(self._folder))
        return self._chat

    def end(self) -> None:
        """End the chat."""
        self._stack.close()


@contextmanager
def chatting(
    folder: Path, *arguments: str, columns: int = 80, rows: int = 24, **variables: str
) -> Iterator[Chat]:
    """A chat that is ready for input, with its Talk's log in the folder."""
    log = folder / "log"
    chat = Chat(
        [str(log), *arguments], environment(folder, **NO_REFLOW, **variables), columns, rows, program=PROGRAM
    )
    chat.log = log
    with chat:
        chat.wait_for(lambda: bool(chat.input_rows) and chat.status.startswith("QwQ"))
        yield chat
