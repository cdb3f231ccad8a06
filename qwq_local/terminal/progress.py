"""Progress of long work: one line that is drawn over itself, with a bar, a rate and the time left.

Pipes get nothing. A terminal that cannot draw over a line gets the label once, and a log file gets a plain
line every half minute. Uses the standard library only.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from qwq_local.terminal.output import Output
from qwq_local.terminal.sanitizer import cell_width, one_line
from qwq_local.text import time_left

Clock = Callable[[], float]
"""Seconds from any start, never backwards; time.monotonic in the program."""

APPEARS_AFTER_S = 0.3
REDRAW_S = 0.1
BAR_CELLS = 24
MIN_BAR_CELLS = 8
PLAIN_EVERY_S = 30.0
RATE_OVER_S = 20.0
"""The rate is that of the last seconds: tensors of different types take different times."""


@dataclass(frozen=True, slots=True)
class Unit:
    """How amounts are written: done and total, an amount per second if that is shown, the gap before them."""

    amounts: Callable[[float, float], str]
    rate: Callable[[float], str] | None = None
    gap: str = " "


def _percents(done: float, total: float) -> int:
    return int(done / total * 100)  # rounded down: 100 % is shown only when everything is there


SHARE = Unit(lambda done, total: f"{_percents(done, total)}%")
TOKENS = Unit(lambda done, total: f"{done:,.0f} / {total:,.0f} tokens", lambda rate: f"{rate:,.0f} tok/s")
BYTES = Unit(
    lambda done, total: f"{_percents(done, total)} %", lambda rate: f"{rate / 1e6:,.1f} MB/s", gap=" · "
)


class StatusLine:
    """A line at the cursor that is drawn over itself and can be erased."""

    def __init__(self, output: Output, clock: Clock) -> None:
        self._output = output
        self._clock = clock
        self._appears_at = clock() + APPEARS_AFTER_S
        self._next_draw = self._appears_at
        self._drawn = ""

    @property
    def is_due(self) -> bool:
        """Whether it is time to draw: at most ten times a second, and not in the first moments."""
        return self._output.is_terminal and self._clock() >= self._next_draw

    def draw(self, text: str) -> None:
        """Show the text, cut to the window. A dumb terminal gets only the first one, on a line of its own."""
        line = one_line(text, self._output.size()[0] - 1)
        self._next_draw = self._clock() + REDRAW_S
        # Set first: an interrupt may come during the write, and then the line must be erased.
        before, self._drawn = self._drawn, line
        if self._output.is_dumb:
            self._output.write("" if before else line + "\n")
        elif line != before:
            self._output.write(f"\r{line}\x1b[K")

    def erase(self) -> None:
        """Erase the line. `draw` draws it again."""
        if self._drawn and self._output.is_live:
            self._output.write("\r\x1b[K")
            self._drawn = ""


class Progress:
    """How far some work is; `done` of `total` is there at the start."""

    def __init__(self, total: float, clock: Clock, unit: Unit = SHARE, done: float = 0.0) -> None:
        self.unit = unit
        self.started_at = clock()
        self._total = total or 1
        self._clock = clock
        self._done = done
        self._marks = deque([(self.started_at, done)])

    def update(self, done: float) -> None:
        """Set how much is done in all."""
        now, self._done = self._clock(), min(done, self._total)
        if now - self._marks[-1][0] >= 0.5:
            self._marks.append((now, done))
            while now - self._marks[0][0] > RATE_OVER_S and len(self._marks) > 2:
                self._marks.popleft()

    def figures(self) -> str:
        """The amounts, the rate and the time left."""
        parts = [self.unit.amounts(self._done, self._total)]
        start, done_then = self._marks[0]
        elapsed = self._clock() - start
        if self.unit.rate and elapsed > 0 and self._done > done_then:
            rate = (self._done - done_then) / elapsed
            parts += [self.unit.rate(rate), f"{time_left((self._total - self._done) / rate)} left"]
        return " · ".join(parts)

    def text(self, label: str, columns: int) -> str:
        """The line for a window of this width: first the bar gives way, then the label, then the figures."""
        figures = self.figures()
        room = columns - cell_width(figures) - len(self.unit.gap)
        cells = min(BAR_CELLS, room - cell_width(label) - 1)
        if room < -len(self.unit.gap):
            return f"{label.partition(' ')[0]} {_percents(self._done, self._total)}%"
        if cells < MIN_BAR_CELLS:
            return figures if room < MIN_BAR_CELLS else f"{one_line(label, room)}{self.unit.gap}{figures}"
        full = int(self._done / self._total * cells)
        return f"{label} {'█' * full}{'░' * (cells - full)}{self.unit.gap}{figures}"


class WorkLine:
    """Progress on a line of its own. With `is_logged`, files and dumb terminals get a line now and then."""

    def __init__(
        self,
        output: Output,
        total: float,
        clock: Clock,
        done: float = 0.0,
        unit: Unit = BYTES,
        is_logged: bool = True,
    ) -> None:
        self.unit = unit
        self._output = output
        self._line = StatusLine(output, clock)
        self._clock = clock
        self._progress = Progress(total, clock, unit, done)
        self._is_logged = is_logged
        self._next_plain = clock() + PLAIN_EVERY_S

    def update(self, label: str, done: float) -> None:
        """Set what is being worked on and how much is done in all."""
        self._progress.update(done)
        if self._output.is_live or not self._is_logged:
            if self._line.is_due:
                self._line.draw(self._progress.text(label, self._output.size()[0] - 1))
        elif self._clock() >= self._next_plain:
            self._next_plain = self._clock() + PLAIN_EVERY_S
            self._output.write(one_line(f"{label} · {self._progress.figures()}", 500) + "\n")

    def erase(self) -> None:
        """Erase the line, to write something in its place. The next update draws it again."""
        self._line.erase()
