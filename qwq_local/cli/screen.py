"""What long work shows on stderr: lines, and below them one line that is drawn over itself."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from typing import TypeVar

from qwq_local.terminal.output import Output
from qwq_local.terminal.progress import Clock, WorkLine
from qwq_local.terminal.sanitizer import one_line

Step = TypeVar("Step")
Value = TypeVar("Value")


class WorkScreen:
    """Lines, and how far the work is. `start` draws the line; `update` does nothing before it."""

    def __init__(self, output: Output, clock: Clock = time.monotonic) -> None:
        self._output = output
        self._clock = clock
        self._line: WorkLine | None = None

    def start(self, total: int, done: int = 0) -> None:
        """Begins work of `total` bytes, of which `done` are there."""
        self._line = WorkLine(self._output, total, self._clock, done)

    def update(self, label: str, done: int) -> None:
        """Draws what is being worked on, and how many bytes are done in all."""
        if self._line is not None:
            self._line.update(label, done)

    def say(self, text: str) -> None:
        """Writes a line."""
        self.close()
        self._output.write(f"{one_line(text, 2000)}\n")

    def close(self) -> None:
        """Erases the drawn line."""
        if self._line is not None:
            self._line.erase()


def drained(work: Generator[Step, None, Value], show: Callable[[Step], None]) -> Value:
    """Shows every step. Returns what the generator returns."""
    while True:
        try:
            show(next(work))
        except StopIteration as finished:
            value: Value = finished.value
            return value
