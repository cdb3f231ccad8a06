"""A terminal for tests: a text stream with a terminal emulator, and a clock that tests move."""

from __future__ import annotations

import io

import pyte

from qwq_local.terminal.output import Output


class Clock:
    """A clock that only a test moves."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    """A stream whose characters move a real cursor; `written` keeps them, `writes` counts the calls."""

    def __init__(self, columns: int = 80, rows: int = 24) -> None:
        super().__init__()
        self.columns, self.rows = columns, rows
        self.screen = pyte.HistoryScreen(columns, rows, history=100_000, ratio=0.5)
        self._stream = pyte.Stream(self.screen)
        self._pieces: list[str] = []

    @property
    def written(self) -> str:
        """Everything that was written so far."""
        return "".join(self._pieces)

    @property
    def writes(self) -> int:
        """The number of writes."""
        return len(self._pieces)

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        self._pieces.append(text)
        self._stream.feed(text.replace("\n", "\r\n"))
        return len(text)

    def resize(self, columns: int, rows: int) -> None:
        """Change the window as the emulator does: rows are cropped, not wrapped again."""
        self.columns, self.rows = columns, rows
        self.screen.resize(rows, columns)

    def lines(self) -> list[str]:
        """Scrollback and screen as text, without the empty rows below the last one."""
        rows = [*self.screen.history.top, *(self.screen.buffer[y] for y in range(self.screen.lines))]
        text = ["".join(row[x].data for x in range(self.screen.columns)).rstrip() for row in rows]
        while text and not text[-1]:
            text.pop()
        return text

    def output(self, *, is_dumb: bool = False, has_color: bool = True, reflows: bool = False) -> Output:
        """This terminal as the program's output."""
        return Output(self, True, is_dumb, has_color, reflows, lambda: (self.columns, self.rows))


def screen_of(text: str, columns: int = 80, rows: int = 24) -> list[str]:
    """The screen after a text is written at once."""
    terminal = Terminal(columns, rows)
    terminal.write(text)
    return terminal.lines()


def pieces(text: str, cuts: list[int]) -> list[str]:
    """The text in pieces whose lengths repeat."""
    parts, position, index = [], 0, 0
    while position < len(text):
        parts.append(text[position : position + cuts[index % len(cuts)]])
        position += cuts[index % len(cuts)]
        index += 1
    return parts
